"""Installs fedfm: federated learning of foundation models in JAX."""

import pathlib

import setuptools

# Epsilons, of every privacy mechanism.
PRIVACY = ["dp-accounting>=0.6"]
TEST = ["pytest", "pytest-xdist", "hypothesis", "chex", *PRIVACY]
DEV = TEST + ["ruff", "pyrefly"]
# Hugging Face: its tokenizers and chat templates, its models to compare with.
HF = ["jinja2", "peft", "sentencepiece", "tokenizers", "torch", "transformers"]

setuptools.setup(
  name="fedfm",
  version="0.1.0",
  description="Federated learning of foundation models in JAX",
  long_description=(pathlib.Path(__file__).parent / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["fedfm", "fedfm.*"]),
  package_data={"fedfm.models": ["byte_llama/*"]},
  install_requires=[
    "absl-py",
    "array-record",
    "flax>=0.12",
    "jax>=0.10.2",
    "matplotlib",
    "ml-collections",
    "numpy",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "safetensors>=0.5",
    "tensorboardX",
    "tensorflow-datasets>=4.9.9",
  ],
  # jax's own extra pins the libtpu that goes with each jax.
  extras_require={
    "test": TEST,
    "dev": DEV,
    "hf": HF,
    "privacy": PRIVACY,
    "tpu": ["jax[tpu]"],
  },
  classifiers=[
    "License :: OSI Approved :: Apache Software License",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
  ],
)
