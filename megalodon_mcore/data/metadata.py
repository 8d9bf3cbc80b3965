"""The sidecar file beside the datasets, by which `prepare-data` tells later commands of them."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalodon_mcore.data.megatron_split import working_split

_FORMAT = 1


@dataclass
class DatasetInfo:
    """One Megatron indexed dataset: its prefix (PREFIX.bin and PREFIX.idx) and its size."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    bytes: int


@dataclass
class PreparedData:
    """Everything a training or evaluation command needs to know about prepared data.

    `datasets` has the keys "train", "valid" and "test" (those that were asked for) when the data
    was split, and the one key "all" when it was not. All paths are absolute once loaded; in the
    file, those below the file's folder are relative, so that the folder can be moved.
    """

    tokenizer_type: str
    tokenizer_model: str
    vocab_size: int
    eod_id: int | None
    append_eod: bool
    byte_level: bool
    sequence_level: str
    dtype: str
    datasets: dict[str, DatasetInfo]
    split: list[float] | None = None
    seed: int | None = None
    cut_documents: int = 0
    skipped_files: int = 0
    inputs: list[str] = field(default_factory=list)

    def megatron_arguments(self) -> list[str]:
        """The command-line arguments that make Megatron train on this data."""
        arguments = ["--tokenizer-type", self.tokenizer_type]
        arguments += ["--tokenizer-model", self.tokenizer_model]
        for name, dataset in self.datasets.items():
            option = "--data-path" if name == "all" else f"--{name}-data-path"
            arguments += [option, dataset.prefix]
        if "all" in self.datasets:
            arguments += ["--split", working_split(self.datasets["all"].sequences)]
        return arguments

    def save(self, output_prefix: str | os.PathLike, file: Path | None = None) -> Path:
        """Write the sidecar of `output_prefix` (into `file`, if it is to be moved there later)."""
        home = metadata_path(output_prefix).parent
        content: dict[str, Any] = {"format": _FORMAT, **asdict(self)}
        content["tokenizer_model"] = _relative(self.tokenizer_model, home)
        for dataset in content["datasets"].values():
            dataset["prefix"] = _relative(dataset["prefix"], home)
        file = file or metadata_path(output_prefix)
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, output_prefix: str | os.PathLike) -> "PreparedData":
        """Read the sidecar of `output_prefix`, the prefix given to `prepare-data`."""
        path = metadata_path(output_prefix)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no prepared data at {str(output_prefix)!r} ({path} is missing): "
                f"make it with megalodon-mcore prepare-data INPUT --output-prefix {output_prefix}"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}): run prepare-data again with --overwrite"
            ) from error
        if content.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is of another version: run prepare-data again")
        content["tokenizer_model"] = str(path.parent / content["tokenizer_model"])
        content["datasets"] = {
            name: DatasetInfo(**{**dataset, "prefix": str(path.parent / dataset["prefix"])})
            for name, dataset in content["datasets"].items()
        }
        return cls(**content)


def metadata_path(output_prefix: str | os.PathLike) -> Path:
    """Where the sidecar of `output_prefix` lies."""
    return Path(os.path.abspath(f"{os.fspath(output_prefix)}_meta.json"))


def _relative(path: str, home: Path) -> str:
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(home) if absolute.is_relative_to(home) else absolute)
