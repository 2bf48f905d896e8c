"""A tiny Llama folder as transformers lays it out, for tests."""

import json

import numpy as np
from safetensors import numpy as safetensors_numpy

CONFIG = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_act": "silu",
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 4,
  "vocab_size": 16,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500.0,
  "rope_scaling": None,
  "tie_word_embeddings": False,
  "torch_dtype": "float32",
}


def tensors(dtype=np.float32, tied=False):
  """What a Llama file holds, by the names and shapes of transformers."""
  rng = np.random.default_rng(0)
  shapes = {
    "model.embed_tokens.weight": (16, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (16, 16),
  }
  for i in range(2):
    layer = f"model.layers.{i}."
    shapes |= {
      layer + "input_layernorm.weight": (16,),
      layer + "post_attention_layernorm.weight": (16,),
      layer + "self_attn.q_proj.weight": (32, 16),
      layer + "self_attn.k_proj.weight": (16, 16),
      layer + "self_attn.v_proj.weight": (16, 16),
      layer + "self_attn.o_proj.weight": (16, 32),
      layer + "mlp.gate_proj.weight": (24, 16),
      layer + "mlp.up_proj.weight": (24, 16),
      layer + "mlp.down_proj.weight": (16, 24),
    }
  if tied:
    del shapes["lm_head.weight"]
  return {k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()}


def write(folder, values=None, **fields):
  """Writes a folder with the reference library."""
  values = tensors() if values is None else values
  (folder / "config.json").write_text(json.dumps(CONFIG | fields))
  safetensors_numpy.save_file(
    values, folder / "model.safetensors", metadata={"format": "pt"}
  )
