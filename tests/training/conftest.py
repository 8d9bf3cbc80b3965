"""What tests of training have in common."""

import pytest

from training.packed_samples import document_prefixes
from training.runs import MODEL, SCHEDULE


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Arguments that train on short documents, kept apart."""
    folder = tmp_path_factory.mktemp("documents")
    prefix, *_ = document_prefixes(folder, ("documents",))
    return (
        *(*MODEL, *SCHEDULE, "--train-iters", "4", "--data-path", prefix, "--split", "1,0,0"),
        *("--dataloader-inter-document-masking", "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", str(folder / "byte_tokenizer")),
    )
