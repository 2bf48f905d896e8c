r"""Writes tests/fixtures/peft: adapters saved by PEFT, on the models' fixtures.

  python tests/make_adapter_fixtures.py

Needs the extra `hf` (transformers, torch, peft); the tests that read these
files do not. Weights are random. `expected.npz` holds the tokens and, for each
adapter, the logits of PEFT's own model.
"""

import json
import pathlib
import shutil

import numpy as np
import peft
import torch
import transformers

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
OUTPUT = FIXTURES / "peft"
# A folder's name is that of its base and what it holds. The bases are chosen
# for what differs: grouped heads, kernels that are parts of one of theirs,
# biases, scaled embeddings, windows.
ADAPTERS = {
  "llama-lora": peft.LoraConfig(
    r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"]
  ),
  "llama-rslora": peft.LoraConfig(
    r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True
  ),
  "llama-dora": peft.LoraConfig(
    r=2, lora_alpha=4, target_modules=["k_proj", "up_proj"], use_dora=True
  ),
  "llama-prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=3),
  "llama-prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=3),
  "gpt2-lora": peft.LoraConfig(
    r=2, lora_alpha=3, target_modules=["c_attn", "attn.c_proj"],
    fan_in_fan_out=True,
  ),
  "gpt2-ia3": peft.IA3Config(
    target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"],
    fan_in_fan_out=True,
  ),
  "phi3-dora": peft.LoraConfig(
    r=2, lora_alpha=4, target_modules=["qkv_proj"], use_dora=True
  ),
  "qwen2-ia3": peft.IA3Config(
    target_modules=["k_proj", "v_proj", "down_proj"],
    feedforward_modules=["down_proj"],
  ),
  "gemma2-prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=3),
  "gemma2-prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=3),
}  # fmt: skip


def main():
  shutil.rmtree(OUTPUT, ignore_errors=True)
  expected = {}
  for name, config in ADAPTERS.items():
    base = transformers.AutoModelForCausalLM.from_pretrained(
      FIXTURES / "models" / name.partition("-")[0],
      dtype="float32",
      attn_implementation="eager",
    )
    vocab_size = base.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab_size, (2, 9), generator=generator)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(2)
    model = peft.get_peft_model(base, config).eval()
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.data += 0.2 * torch.randn(parameter.shape)
    folder = OUTPUT / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    settings = folder / "adapter_config.json"
    values = json.loads(settings.read_text())
    values["base_model_name_or_path"] = None
    settings.write_text(json.dumps(values, indent=1) + "\n")
    with torch.no_grad():
      logits = model(tokens).logits[:, -tokens.shape[1] :]
    expected[f"{name}.tokens"] = tokens.numpy().astype(np.int32)
    expected[f"{name}.logits"] = logits.numpy()
  np.savez_compressed(OUTPUT / "expected.npz", **expected)


if __name__ == "__main__":
  main()
