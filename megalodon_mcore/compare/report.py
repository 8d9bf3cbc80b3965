"""report.md: in words what the numbers say, whoever they favour, and the tables behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megalodon_mcore.compare.numbers import (
    FAILS,
    contexts,
    difference,
    diverged,
    fails_at,
    final_loss,
    least_cost,
    loss_at,
)
from megalodon_mcore.compare.presets import GPT, HE, MEGALODON, WINDOW

EARLY = 10.0
"""Tokens for each parameter below which training has only begun; some 20 are compute-optimal."""


def label(results: dict[str, Any], peer: str) -> str:
    """A peer's name in sentences and plots."""
    window = f"GPT with a window of {results['settings']['window']}"
    he = "GPT with Megalodon's initialization"
    return {MEGALODON: "Megalodon", GPT: "GPT", WINDOW: window, HE: he}.get(peer, peer)


def summary(results: dict[str, Any]) -> str:
    """What holds and what does not, a line a finding; the first peer beside each other one."""
    first, *others = results["peers"]
    lines = [z for other in others for z in _beside(results, first, other)]
    lines += [_context(results, peer) for peer in results["peers"]]
    lines += _doubts(results)
    return "\n".join(f"- {line}" for line in lines)


def _beside(results: dict[str, Any], first: str, other: str) -> Iterable[str]:
    ours, theirs = results["peers"][first], results["peers"][other]
    names = label(results, first), label(results, other)
    pair = [ours, theirs]
    tokens = least_cost(results, pair, "tokens")
    yield (
        f"At equal tokens ({tokens:,.0f}), validation: "
        f"{_verdict(*names, final_loss(ours), final_loss(theirs))}"
    )
    units = {"seconds": "time ({:,.0f} s of steps)", "petaflops": "flops ({:,.3g} petaflops)"}
    for cost, words in units.items():
        at = least_cost(results, pair, cost)
        losses = [loss_at(results, peer, cost, at) for peer in pair]
        yield f"At equal {words.format(at)}, training: {_verdict(*names, *losses)}"
    yield _speed(results, first, other)


def _verdict(first: str, other: str, ours: Any, theirs: Any) -> str:
    """Which of two is ahead, if the seeds tell."""
    found = difference(ours, theirs)
    losses = f"{first} {ours}, {other} {theirs} nats per token"
    apart = abs(found.value)
    if not math.isfinite(apart):
        return f"{losses}; a run diverged, so nothing is claimed."
    if found.winner is None:
        return f"{losses}; of one seed there is no spread, so nothing is claimed."
    by = f"{apart:.4f} (seeds alone may make {found.bound:.4f})"
    if found.winner == 0:
        return f"{losses}; the seeds do not tell them apart: they differ by {by}."
    return f"{losses}; {first if found.winner > 0 else other} is ahead by {by}."


def _speed(results: dict[str, Any], first: str, other: str) -> str:
    ours, theirs = (
        {z["length"]: z for z in results["peers"][peer]["speed"]} for peer in (first, other)
    )
    names = label(results, first), label(results, other)
    words = []
    for length in sorted(ours.keys() & theirs.keys()):
        if "seconds" in ours[length] and "seconds" in theirs[length]:
            ratio = theirs[length]["seconds"] / ours[length]["seconds"]
            memory = ours[length]["bytes"] / theirs[length]["bytes"]
            words.append(f"{length:,}: {ratio:.2f} ({memory:.2f})")
    said = f"Speed of {names[0]} over {names[1]}'s, and memory, by length: " + ", ".join(words)
    if not words:
        said = f"{names[0]} and {names[1]} could be timed together at no length"
    for name, found in zip(names, (ours, theirs), strict=True):
        absent = [length for length, z in found.items() if "seconds" not in z]
        if absent:
            said += f"; {name} was not timed from {min(absent):,} on, for memory"
    return said + "."


def _context(results: dict[str, Any], peer: str) -> str:
    """How a model does beyond the length it was trained with."""
    name = label(results, peer)
    if diverged(results["peers"][peer]):
        return f"{name} diverged, and of its loss beyond the training length nothing can be said."
    found = contexts(results, results["peers"][peer])
    length, longest = results["settings"]["seq_length"], results["settings"]["seq_length"]
    longest *= results["settings"]["times_longer"]
    beyond, failed = found[1:], fails_at(found[1:])
    reached = found[-1].stop
    ended = "" if reached == longest else f" Memory ended its evaluation at {reached:,} positions."
    if longest == length:
        return f"{name} was not evaluated beyond its training length {length:,} (--times-longer 1)."
    if not beyond:
        return f"{name} could not be evaluated beyond its training length {length:,}.{ended}"
    if failed:
        return (
            f"{name} fails beyond its training length {length:,}: at positions {failed.start:,} to "
            f"{failed.stop:,} its loss is {-failed.gain:.3f} nats above that of the same tokens in "
            f"windows of {length:,} (a failure is {FAILS:g} or more).{ended}"
        )
    gain = beyond[-1].gain
    what = f"gains {gain:.3f} nats from" if gain > 0 else f"loses {-gain:.3f} nats by"
    return (
        f"{name} holds to {reached:,} positions, {reached / length:g} times its training length: "
        f"at the last of them (from {beyond[-1].start:,}) it {what} the whole context, against "
        f"windows of {length:,} over the same tokens.{ended}"
    )


def _doubts(results: dict[str, Any]) -> Iterable[str]:
    """What would make the numbers less than they seem."""
    unigram = results["text_facts"]["unigram_loss"]
    for name, peer in results["peers"].items():
        rates = [z["learning_rate"] for z in peer["sweep"]]
        best, who = peer["learning_rate"], label(results, name)
        if seeds := diverged(peer):
            yield f"{who} diverged at learning rate {best:g} in seed {', '.join(map(str, seeds))}."
        lost = [z["learning_rate"] for z in peer["sweep"] if not math.isfinite(z["loss"])]
        if lost:
            each = ", ".join(f"{rate:g}" for rate in lost)
            yield f"{who} diverged in the sweep at learning rate {each}."
        if len(rates) == 1:
            yield (
                f"{who} was trained with one learning rate, {best:g}, which need not be its best."
            )
        elif best in (min(rates), max(rates)):
            yield (
                f"{who}'s best learning rate, {best:g}, is at an end of its sweep; a rate beyond "
                "it (--learning-rates) may do better."
            )
        if final_loss(peer).mean >= unigram:
            yield (
                f"{who} is not below the unigram loss {unigram:.4f}: it has learned no context, "
                "and comparing it means little."
            )
    train = results["text_facts"]["train_tokens"]
    settings = results["settings"]
    seen = settings["iterations"] * settings["batch_size"] * settings["seq_length"]
    least = min(seen / peer["parameters"] for peer in results["peers"].values())
    if least < EARLY:
        yield (
            f"{seen:,} tokens are {least:.2g} for each parameter: this is the beginning of "
            "training, which need not end as it began."
        )
    if seen > train:
        yield f"The {train:,} training tokens were seen {seen / train:.1f} times."


def page(results: dict[str, Any]) -> str:
    """report.md."""
    settings, text = results["settings"], results["text_facts"]
    length, longest = settings["seq_length"], settings["seq_length"] * settings["times_longer"]
    steps, batch = settings["iterations"], settings["batch_size"]
    rows, alone = text["rows"], text["rows_of_one_document"]
    return f"""# Models of equal size, beside each other

{summary(results)}

"Ahead" is a difference of means over seeds beyond what seeds alone make of equal models in 19 of 20
comparisons (Welch's test). At equal time or flops, the run that is cheaper has ended its
learning-rate schedule and the other one has not yet, which favours the former.

![loss](loss.png)

## Sizes

{_sizes(results)}

## Learning rates

Validation loss after {settings["sweep_iterations"]} steps, each with a whole schedule.

{_sweep(results)}

## Final loss

Nats per token of {rows * longest:,} validation tokens in windows of {length:,}, after {steps:,}
steps of {batch} x {length:,} tokens. Counting tokens alone (unigram) gives
{text["unigram_loss"]:.4f}.

{_final(results)}
{_ablations(results)}
## Speed and memory by length

Forward and backward passes of one row in one process. Memory is what they allocate beyond the model
on a GPU; on the CPU, what autograd keeps. {_attention(settings)}

{_speeds(results)}

![speed](speed.png)

## Loss by position

{rows} validation texts of {longest:,} tokens: {alone} of one document each, {rows - alone} of
documents joined end to end. The gain is how far a context from the text's start brings the loss
below that of the same tokens in windows of the training length.

{_positions(results)}

![loss by position](position.png)

## Conditions

{_where(results)} A seed sets the first values
and the data's order, which is the same for every model; so are tokenizer, batch, schedule (cosine
to a tenth, a tenth of warm-up), optimizer and precision ({settings["precision"]}); dropout is 0 and
weight decay spares what has one axis (norms, biases). {_initialization(results)} Learning
rates were chosen by the validation documents that losses are given of. Each run's folder has its
command in command.txt.
Time is steps times the median step of the seed whose steps were fastest, so that interruptions,
compiling and, in the other seeds, what else the machine did count for nothing.
"""


def _initialization(results: dict[str, Any]) -> str:
    theirs = "at any width, which is little for a narrow model"
    words = "Megalodon's weights start as released (a deviation of 1/sqrt(3 inputs))"
    if {GPT, WINDOW} & results["peers"].keys():
        words += f", GPT's as Megatron has them (0.02 {theirs}; --peers {HE} has Megalodon's)"
    return words + "."


def _where(results: dict[str, Any]) -> str:
    text, peers = results["text_facts"], results["peers"].values()
    machines = " and ".join(dict.fromkeys(peer["device"] for peer in peers))
    return (
        f"Machine: {machines}. Text: {' '.join(results['text'])}, {text['train_tokens']:,} "
        f"training and {text['valid_tokens']:,} validation tokens."
    )


def _attention(settings: dict[str, Any]) -> str:
    if settings["implementation"] != "local":
        return "Attention is Transformer Engine's. Flops are counted up to the diagonal."
    return (
        "GPT's attention is Megatron's local one, which keeps all scores (a window is a mask over "
        "them) and stops where they would take more than "
        f"{settings['memory']:g} GiB (--memory); fused attention, as in patterns, needs less. "
        "Flops are counted up to the diagonal, of a window too."
    )


def _table(head: list[str], rows: Iterable[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _sizes(results: dict[str, Any]) -> str:
    head = ["model", "parameters", "layers", "hidden size", "FFN", "attention heads", "flops/token"]
    rows = []
    for name, peer in results["peers"].items():
        shape, flops = peer["shape"], f"{peer['flops_per_token'] / 1e6:,.1f}M"
        widths = [shape["layers"], shape["hidden_size"], shape["ffn_hidden_size"]]
        heads = shape["heads"] or results["settings"]["heads"]
        rows.append([label(results, name), f"{peer['parameters']:,}", *widths, heads, flops])
    return _table(head, rows)


def _sweep(results: dict[str, Any]) -> str:
    rates = [f"{z:g}" for z in results["settings"]["learning_rates"]]
    rows = []
    for name, peer in results["peers"].items():
        each = {
            z["learning_rate"]: f"{z['loss']:.4f}" if math.isfinite(z["loss"]) else "diverged"
            for z in peer["sweep"]
        }
        each[peer["learning_rate"]] = f"**{each[peer['learning_rate']]}**"
        rows.append([label(results, name), *each.values()])
    return _table(["model", *rates], rows)


def _ablations(results: dict[str, Any]) -> str:
    """A section, where there are some."""
    if not results.get("ablations"):
        return ""
    head = ["model", "learning rate", "seeds", "loss", "above its model's", "seeds alone may make"]
    rows = []
    for name, found in results["ablations"].items():
        seeds = [seed["seed"] for seed in found["seeds"]]
        whole = results["peers"][found["peer"]]
        same = [seed for seed in whole["seeds"] if seed["seed"] in seeds]
        apart = difference(final_loss({"seeds": same}), final_loss(found))
        rows.append(
            [
                f"{label(results, found['peer'])}: {name}",
                f"{found['learning_rate']:g}",
                ", ".join(map(str, seeds)),
                final_loss(found),
                f"{apart.value:+.4f}",
                "-" if apart.bound is None else f"{apart.bound:.4f}",
            ]
        )
    return f"""
## Ablations

Each is another than its model in one thing, has that model's best learning rate (or the one that it
is named by) and was not tuned anew. What is left out is not made up for by width. A positive number
is what it loses; of one seed nobody knows what seeds alone may make.

{_table(head, rows)}
"""


def _final(results: dict[str, Any]) -> str:
    seeds = [f"seed {z}" for z in results["settings"]["seeds"]]
    rows = []
    for name, peer in results["peers"].items():
        each = [f"{final_loss({'seeds': [z]}).mean:.4f}" for z in peer["seeds"]]
        seconds = [f"{z['seconds_per_step']:.3g}" for z in peer["seeds"]]
        rows.append([label(results, name), *each, final_loss(peer), f"{', '.join(seconds)} s"])
    return _table(["model", *seeds, "mean ± deviation", "a step"], rows)


def _speeds(results: dict[str, Any]) -> str:
    rows = []
    for name, peer in results["peers"].items():
        for one in peer["speed"]:
            start = [label(results, name), f"{one['length']:,}"]
            if "seconds" in one:
                speed, memory = one["length"] / one["seconds"], one["bytes"] / 2**20
                rows.append([*start, f"{speed:,.0f}", f"{memory:,.0f} MiB"])
            else:
                needs = "" if one["needs"] is None else f" (scores alone {one['needs']:,.1f} GiB)"
                rows.append([*start, "-", f"not measured: memory{needs}"])
    return _table(["model", "length", "tokens/s", "memory"], rows)


def _positions(results: dict[str, Any]) -> str:
    rows = [
        [label(results, name), f"{z.start:,}-{z.stop:,}", f"{z.whole:.4f}", f"{z.gain:+.4f}"]
        for name, peer in results["peers"].items()
        for z in contexts(results, peer)
    ]
    return _table(["model", "positions", "loss", "gain"], rows)
