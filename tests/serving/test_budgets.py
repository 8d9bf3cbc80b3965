"""Prompts cut anywhere, by however few tokens a step may have, and pools with room for few."""

import random

import pytest
from served import CHUNK, check_answers, check_bfloat16, draw, export, needs_vllm

pytestmark = [pytest.mark.vllm, needs_vllm]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, export(folder)


@pytest.mark.parametrize("budget", [16, 61, 2048])
def test_prompts_in_pieces(exported, budget):
    folder, model = exported
    generator = random.Random(budget)
    lengths = [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 100, 333, 1000, 2500]
    prompts = [draw(generator, n) for n in lengths]
    check_answers(model, folder, prompts, 10, max_num_seqs=8, max_num_batched_tokens=budget)


def test_requests_wait_where_the_pool_has_few_pages(exported):
    folder, model = exported
    generator = random.Random(9)
    prompts = [draw(generator, generator.randrange(1, 60)) for _ in range(20)]
    # A page for nobody and four requests.
    check_answers(model, folder, prompts, 30, num_gpu_blocks_override=5)


def test_bfloat16_is_as_good_as_the_hugging_face_models(exported):
    folder, model = exported
    generator = random.Random(10)
    prompts = [draw(generator, generator.randrange(1, 200)) for _ in range(20)]
    check_bfloat16(model, folder, prompts)
