"""Makes tests/fixtures/models from the Hugging Face implementations.

Tiny models with random weights, one a family and a few of its options, and what
transformers computes with them in float32: logits, loss, greedy tokens. Needs
the extra `hf`.

  python tests/make_model_fixtures.py
"""

import json
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 by it.)
import numpy as np
import safetensors.numpy

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"
VOCAB, LENGTH, PADDING, PROMPT, NEW, SHORT = 32, 20, 6, 12, 8, 10
WINDOW = 8  # Shorter than the sequences, and than the prompt.
TABLES = ("embed_tokens.weight", "wte.weight")  # Of embeddings.


class Case(NamedTuple):
  """One fixture.

  Attributes:
    kind: The family's name in transformers' classes.
    fields: Of its config class.
    weights: The case whose weights it shares; None has its own.
    greedy: Whether greedy tokens are kept.
    short: Whether logits of a short text, alone, are kept: positions may be
      stretched by the length.
  """

  kind: str
  fields: dict[str, Any]
  weights: str | None = None
  greedy: bool = True
  short: bool = False


def _sizes(**fields: Any) -> dict[str, Any]:
  return {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    **fields,
  }


def _scaled(kind: str, **fields: Any) -> dict[str, Any]:
  rope = {"rope_type": kind, "rope_theta": 1000.0, **fields}
  return _sizes(rope_parameters=rope, max_position_embeddings=16)


def _llama(kind: str, *, short: bool = False, **fields: Any) -> Case:
  return Case("Llama", _scaled(kind, **fields), "llama", False, short)


_TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
_LONG = {
  "rope_type": "longrope",
  "short_factor": [1.0, 1.5],
  "long_factor": [2.0, 6.0],
  "rope_theta": 10000.0,
  "partial_rotary_factor": 0.5,
}
CASES = {
  "llama": Case("Llama", _sizes()),
  "llama_biases_tied": Case(
    "Llama",
    _sizes(
      attention_bias=True,
      mlp_bias=True,
      tie_word_embeddings=True,
      num_key_value_heads=4,
    ),
  ),
  "llama_linear": _llama("linear", factor=4.0),
  "llama_dynamic": _llama("dynamic", factor=4.0, short=True),
  "llama_yarn": _llama(
    "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0
  ),
  "llama_llama3": _llama(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=12,
  ),
  "mistral": Case("Mistral", _sizes(sliding_window=WINDOW, head_dim=8)),
  "qwen2": Case("Qwen2", _sizes(tie_word_embeddings=True)),
  "qwen2_windows": Case(
    "Qwen2",
    _sizes(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    | {"tie_word_embeddings": True},
    "qwen2",
  ),
  "qwen3": Case("Qwen3", _sizes(head_dim=8)),
  "gemma2": Case(
    "Gemma2",
    _sizes(
      head_dim=8,
      query_pre_attn_scalar=6,
      sliding_window=WINDOW,
      attn_logit_softcapping=3.0,
      final_logit_softcapping=4.0,
    ),
  ),
  "gemma3": Case(
    "Gemma3Text",
    _sizes(
      num_hidden_layers=3,
      head_dim=8,
      query_pre_attn_scalar=8,
      sliding_window=WINDOW,
      layer_types=["sliding_attention"] * 2 + ["full_attention"],
      rope_parameters={
        "full_attention": {
          "rope_type": "linear",
          "factor": 8.0,
          "rope_theta": 5000.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
      },
    ),
  ),
  "gpt2": Case(
    "GPT2",
    {
      "vocab_size": VOCAB,
      "n_embd": 16,
      "n_layer": 2,
      "n_head": 4,
      "n_positions": 64,
      "bos_token_id": None,
      "eos_token_id": None,
    },
  ),
  "olmo2": Case("Olmo2", _sizes()),
  "phi3": Case("Phi3", _sizes(sliding_window=WINDOW, **_TWO_HEADS)),
  "phi3_longrope": Case(
    "Phi3",
    _sizes(
      rope_parameters=_LONG,
      original_max_position_embeddings=PROMPT - 1,
      **_TWO_HEADS,
    ),
    "phi3",
    short=True,
  ),
}


def tokens() -> np.ndarray:
  """Returns the [2, LENGTH] tokens of every case."""
  return np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH))


def padded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns a row that begins with padding: tokens, mask, positions."""
  mask = np.arange(LENGTH) >= PADDING
  row = np.where(mask, np.roll(tokens()[0], PADDING), 0)
  positions = np.maximum(np.arange(LENGTH) - PADDING, 0)
  return row[None], mask[None], positions[None]


def flip(folder: pathlib.Path, other: pathlib.Path) -> None:
  """Copies a folder with its tied head untied, or the other way round."""
  values = json.loads((folder / "config.json").read_text())
  tied = values["tie_word_embeddings"]
  values["tie_word_embeddings"] = not tied
  (other / "config.json").write_text(json.dumps(values))
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  if tied:
    (table,) = (v for k, v in tensors.items() if k.endswith(TABLES))
    tensors["lm_head.weight"] = np.flip(table, axis=0).copy()
  else:
    del tensors["lm_head.weight"]
  safetensors.numpy.save_file(
    tensors, other / "model.safetensors", metadata={"format": "pt"}
  )


def make(case: Case, folder: pathlib.Path, weights: pathlib.Path) -> None:
  """Makes a case in `folder`, with the weights there or in `weights`."""
  import torch
  import transformers

  config = getattr(transformers, f"{case.kind}Config")(**case.fields)
  if case.weights is None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(folder)
  else:
    shutil.copy(weights / "model.safetensors", folder)
    config.architectures = json.loads((weights / "config.json").read_text())[
      "architectures"
    ]
    config.save_pretrained(folder)
  for path in folder.glob("generation_config.json"):
    path.unlink()
  np.savez_compressed(folder / "expected.npz", **expected(case, folder))
  if case.weights is not None:
    (folder / "model.safetensors").unlink()


def randomise(model: Any) -> None:
  """Draws weights large enough for every part to matter."""
  import torch

  rng = np.random.default_rng(0)
  for name, parameter in sorted(model.named_parameters()):
    value = rng.normal(0, 0.4, tuple(parameter.shape))
    if "norm" in name or "ln_" in name:
      value = parameter.detach().numpy() + 0.5 * value
    parameter.data.copy_(torch.tensor(value, dtype=torch.float32))


def load(folder: pathlib.Path | str) -> Any:
  """Loads a folder with transformers; every tensor must find its place."""
  import torch
  import transformers

  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder,
    dtype=torch.float32,
    attn_implementation="eager",
    output_loading_info=True,
  )
  wrong = {k: v for k, v in info.items() if v}
  assert not wrong, f"{folder}: {wrong}"
  return model.eval()


def expected(case: Case, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Computes what transformers makes of a folder."""
  import torch

  def logits(model, ids, **options):
    with torch.no_grad():
      options = {k: torch.tensor(v) for k, v in options.items()}
      return model(torch.tensor(ids), **options).logits.numpy()

  result = {}
  if case.short:  # First: the rope of "dynamic" remembers a longer text.
    result["short"] = logits(load(folder), tokens()[:1, :SHORT])
  row, mask, positions = padded()
  whole = load(folder)
  result["padded"] = logits(
    load(folder), row, attention_mask=mask, position_ids=positions
  )[:, PADDING:]
  ids = torch.tensor(tokens())
  with torch.no_grad():
    out = whole(ids, labels=ids)
  result["logits"], result["loss"] = out.logits.numpy(), out.loss.numpy()
  with tempfile.TemporaryDirectory() as other:
    flip(folder, pathlib.Path(other))
    result["flipped"] = logits(load(other), tokens()[:1])
  if case.greedy:
    result["greedy"] = greedy(load(folder))
  return result


def greedy(model: Any) -> np.ndarray:
  """Greedy tokens [2, NEW]; no close call, which rounding could decide."""
  import torch

  out = model.generate(
    torch.tensor(tokens()[:, :PROMPT]),
    attention_mask=torch.ones(2, PROMPT),
    max_new_tokens=NEW,
    do_sample=False,
    output_logits=True,
    return_dict_in_generate=True,
  )
  top = torch.stack(out.logits).topk(2, dim=-1).values
  margin = (top[..., 0] - top[..., 1]).min().item()
  assert margin > 1e-3, f"a close call: {margin}"
  return out.sequences[:, PROMPT:].numpy()


def make_all(root: pathlib.Path) -> None:
  """Makes every case below `root`."""
  for name, case in CASES.items():
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(case, folder, root / (case.weights or name))


if __name__ == "__main__":
  make_all(FIXTURES)
