"""Installs megalodon_mcore; the folder kernels/ becomes the package megalodon_mcore.kernels."""

import re
from pathlib import Path

from setuptools import find_packages, setup

kernel_packages = ["megalodon_mcore.kernels"] + [
    f"megalodon_mcore.kernels.{name}" for name in find_packages("kernels")
]

source = Path(__file__).with_name("megalodon_mcore") / "__init__.py"
version = re.search(r'^__version__ = "(.+)"$', source.read_text(), re.MULTILINE)[1]

setup(
    name="megalodon-mcore",
    version=version,
    license="Apache-2.0",
    license_files=["LICENSE"],
    description="Megalodon, the long-context architecture, trained inside Megatron-Core.",
    python_requires=">=3.12",
    packages=find_packages(include=["megalodon_mcore", "megalodon_mcore.*"]) + kernel_packages,
    package_dir={"megalodon_mcore.kernels": "kernels"},
    install_requires=[
        "megatron-core[training]>=0.19.1,<0.20",
        "torch>=2.11",
        # What the kernels were compiled with, for cards of capability 8.0, 9.0 and 10.0.
        "triton>=3.6,<3.9; platform_system == 'Linux'",
        "numpy",
        "nltk",
        "tokenizers",
        "transformers>=5.4",
        "sentencepiece",
        "safetensors",
        "tensorboard",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        # Its models and their interfaces change from version to version.
        "vllm": ["vllm>=0.32,<0.33"],
        "test": [
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "hypothesis==6.170.15",
            "psutil==7.2.2",
            "ruff==0.17.6",
            "pyrefly==1.4.1",
            "megalodon-jax==0.2.2",
            "jax==0.10.2",
            "jaxlib==0.10.2",
            # Megatron-FSDP's; transformers' Trainer and device_map.
            "einops==0.8.2",
            "accelerate==1.15.0",
            "peft==0.21.2",
            "lm-eval==0.4.13",
            # --optimizer muon
            "emerging-optimizers==0.3.0",
            # What a Megatron-LM checkout compiles its datasets' helpers with.
            "pybind11==3.1.0",
        ],
    },
    entry_points={
        "console_scripts": ["megalodon-mcore = megalodon_mcore.__main__:main"],
        "vllm.general_plugins": ["megalodon = megalodon_mcore.serving:register"],
    },
)
