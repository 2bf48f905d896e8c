"""A decoder language model, from Llama to Gemma, as pure functions.

RMSNorm or LayerNorm, rotary or learned positions, grouped queries, full or
sliding-window attention, a gated MLP or a plain one: `DecoderConfig` says what,
and `decoder_specs` with which parameters.
"""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from fedfm import errors, sharding
from fedfm.models import attention, layers, rope
from fedfm.models import model as model_lib
from fedfm.models.decoder_config import DecoderConfig
from fedfm.models.decoder_specs import KERNELS, decoder_specs
from fedfm.models.model import Model

PyTree = Any
_REMAT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "mlp": jax.checkpoint_policies.save_only_these_names("mlp"),
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def decoder(config: DecoderConfig) -> Model:
  """Builds the decoder as pure functions.

  `apply(params, tokens, *, positions=None, segment_ids=None, cache=None,
  output="logits")` takes tokens [batch, seq] and returns logits
  [batch, seq, vocab] in float32 at least, or `(logits, cache)` when a cache
  from `init_cache(batch, length)` is given; `output="hidden"` stops before the
  output head. Positions count from 0 (or from the cache's index); tokens attend
  causally, within their segment where `segment_ids` [batch, seq] are given.

  Three seams are for adapters. Tokens may be embeddings [batch, seq, width], as
  `embed_tokens` makes them. `params["layers"]` may hold "prefix", {"key",
  "value"} each [layers, prefix, kv_heads, head_dim]: tokens attend to them and
  count positions after them. And it may be a tuple of stacks of layers, which
  run one after the other.

  Args:
    config: Sizes and options.

  Returns:
    A `Model`.

  Examples:
    >>> model = decoder(DecoderConfig(vocab_size=11, width=8, num_layers=2,
    ...                               num_heads=2, mlp_width=16))
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.zeros((1, 5), jnp.int32)).shape
    (1, 5, 11)
  """
  return model_lib.from_specs(
    decoder_specs(config),
    functools.partial(_apply, config),
    config,
    (*KERNELS, "lm_head"),
    unembed=functools.partial(_unembed, config),
    init_cache=functools.partial(_init_cache, config),
  )


def _init_cache(config: DecoderConfig, batch: int, length: int) -> PyTree:
  """Zeroed keys and values [layers, batch, length, kv_heads, head_dim]."""
  _check_length(config, length)
  shape = (config.num_layers, batch, length, config.num_kv_heads)
  zeros = jnp.zeros((*shape, config.head_dim), jnp.dtype(config.dtype))
  return {"key": zeros, "value": zeros, "index": jnp.zeros((), jnp.int32)}


def _check_length(config: DecoderConfig, length: int) -> None:
  """Refuses learned positions past the last, which a gather would repeat."""
  if config.positions == "learned" and length > config.max_length:
    raise errors.ConfigError(
      f"tokens: a sequence of {length}, but the model's longest is "
      f"{config.max_length}"
    )


def _unembed(config: DecoderConfig, params: PyTree, hidden: jax.Array):
  """Maps hidden [..., width] to logits [..., vocab], in float32 at least."""
  # A trained head unties: what counts is what is there.
  if "lm_head" in params:
    logits = layers.dense(hidden, params["lm_head"])
  else:
    logits = hidden @ params["embed"].astype(hidden.dtype).T
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  return layers.softcap(logits, config.logit_softcap)


def _norm(config, x, params, name):
  """A norm by its name; one that the model lacks leaves `x`."""
  if name not in params:
    return x
  scale, epsilon = params[name], config.norm_epsilon
  if config.norm == "layer":
    return layers.layer_norm(x, scale, params[name + "_bias"], epsilon)
  return layers.rms_norm(x, scale, epsilon, config.norm == "rms_unit_offset")


def _dense(x, params, name):
  return layers.dense(x, params[name], params.get(name + "_bias"))


def _heads(config, x, layer, name):
  """Projects to the heads of "q", "k" or "v": [batch, seq, heads, head_dim]."""
  x = _dense(x, layer, f"{name}_proj")
  unit_offset = config.norm == "rms_unit_offset"
  scale = layer.get(f"{name}_norm")
  if scale is not None and config.qk_norm == "projection":
    x = layers.rms_norm(x, scale, config.norm_epsilon, unit_offset)
  x = x.reshape(*x.shape[:2], -1, config.head_dim)
  if scale is not None and config.qk_norm == "head":
    x = layers.rms_norm(x, scale, config.norm_epsilon, unit_offset)
  return x


def _layer(config, x, layer, is_local, rotary, positions, segment_ids, cache):
  """One layer; `cache` is None or this layer's (key, value, index)."""
  b, s, _ = x.shape
  with jax.named_scope("attention"):
    y = _norm(config, x, layer, "attention_norm")
    q, k, v = (_heads(config, y, layer, name) for name in "qkv")
    q = sharding.constrain(q, "batch", "sequence", "heads", None)
    if rotary is not None:
      q, k = rope.rotate(q, *rotary), rope.rotate(k, *rotary)
    options: dict[str, Any] = {
      "window": config.sliding_window,
      "is_local": is_local,
      "scale": (config.query_scalar or config.head_dim) ** -0.5,
      "softcap": config.attention_softcap,
    }
    if cache is None:
      out = attention.causal_attention(
        q,
        *_after_prefix(layer, k, v),
        segment_ids,
        kernel=config.attention_kernel,
        **options,
      )
    else:
      old_key, old_value, index = cache
      k = jax.lax.dynamic_update_slice_in_dim(old_key, k, index, axis=1)
      v = jax.lax.dynamic_update_slice_in_dim(old_value, v, index, axis=1)
      keys, values = _after_prefix(layer, k, v)
      prefix = keys.shape[1] - k.shape[1]
      out = attention.cached_attention(
        q, keys, values, positions, prefix=prefix, **options
      )
    y = _dense(out.reshape(b, s, -1), layer, "o_proj")
    x = x + _norm(config, y, layer, "post_attention_norm")
  with jax.named_scope("mlp"):
    y = _norm(config, x, layer, "mlp_norm")
    activation = layers.ACTIVATIONS[config.activation]
    up = _dense(y, layer, "up_proj")
    if config.gated_mlp:
      gate = _dense(y, layer, "gate_proj")
      gate, up = checkpoint_name((gate, up), "mlp")
      y = activation(gate) * up
    else:
      y = activation(checkpoint_name(up, "mlp"))
    y = sharding.constrain(y, "batch", "sequence", "mlp")
    y = _dense(y, layer, "down_proj")
    x = x + _norm(config, y, layer, "post_mlp_norm")
  x = sharding.constrain(x, "batch", "sequence", "width")
  return x, (None if cache is None else (k, v))


def _after_prefix(layer, key, value):
  """Puts the layer's prefix, if it has one, before keys and values."""
  if "prefix" not in layer:
    return key, value
  own = {"key": key, "value": value}
  both = jax.tree.map(
    lambda p, x: jnp.concatenate(
      [jnp.broadcast_to(p.astype(x.dtype), (x.shape[0], *p.shape)), x], axis=1
    ),
    layer["prefix"],
    own,
  )
  return both["key"], both["value"]


def _rotary(config: DecoderConfig, positions: jax.Array, length: Any) -> Any:
  """Returns `rotary(is_local)` -> cosines and sines, or None."""
  if config.positions != "rope":
    return lambda is_local: None
  turn = functools.partial(
    rope.angles, positions, config.rotary_dim, dtype=config.dtype
  )
  everywhere = turn(
    config.rope_theta,
    config.rope_scaling,
    length=length,
    max_length=config.max_length,
  )
  if config.local_rope_theta is None:
    return lambda is_local: everywhere
  local = turn(config.local_rope_theta)

  def choose(is_local):
    if isinstance(is_local, bool):
      return local if is_local else everywhere
    return tuple(jnp.where(is_local, *pair) for pair in zip(local, everywhere))

  return choose


def embed_tokens(
  config: DecoderConfig, params: PyTree, tokens: jax.Array
) -> jax.Array:
  """Looks tokens up, without positions: what `apply` takes as embeddings.

  Args:
    config: The decoder's.
    params: Its parameters.
    tokens: [batch, seq] integers.

  Returns:
    [batch, seq, width] in the compute dtype.
  """
  table = sharding.constrain(params["embed"], "vocab", None)
  x = table[tokens].astype(jnp.dtype(config.dtype))
  if config.scale_embeddings:
    x = x * jnp.asarray(config.width**0.5, x.dtype)
  return x


def _embed(config, params, tokens, positions, longest):
  """Makes the first [batch, seq, width] of tokens, or of their embeddings."""
  if tokens.ndim == 3:
    x = tokens.astype(jnp.dtype(config.dtype))
  else:
    x = embed_tokens(config, params, tokens)
  if config.positions == "learned":
    _check_length(config, longest)
    x = x + params["position_embed"][positions].astype(x.dtype)
  return sharding.constrain(x, "batch", "sequence", "width")


def _apply(
  config: DecoderConfig,
  params: PyTree,
  tokens: jax.Array,
  *,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  cache: PyTree | None = None,
  output: str = "logits",
):
  """See `decoder`."""
  b, s = tokens.shape[:2]
  stacks = params["layers"]
  stacks = stacks if isinstance(stacks, tuple) else (stacks,)
  prefix = stacks[0].get("prefix")
  num_before = 0 if prefix is None else prefix["key"].shape[1]
  index = jnp.zeros((), jnp.int32) if cache is None else cache["index"]
  # How long the text is, for positions that are stretched by it: with a cache
  # as long as it may become, so that all keys in it are turned alike.
  length: Any = num_before + (s if cache is None else cache["key"].shape[2])
  if positions is None:
    positions = jnp.broadcast_to(index + jnp.arange(s), (b, s))
  elif cache is None:
    length = num_before + jnp.max(positions, axis=-1) + 1
  rotary = _rotary(config, positions + num_before, length)
  with jax.named_scope("embed"):
    x = _embed(config, params, tokens, positions + num_before, num_before + s)

  def run_layer(is_local, x, layer_and_cache):
    layer, kv = layer_and_cache
    kv = None if kv is None else (*kv, index)
    return _layer(
      config, x, layer, is_local, rotary(is_local), positions, segment_ids, kv
    )

  def with_remat(run):
    if config.remat == "none":
      return run
    return jax.checkpoint(run, policy=_REMAT[config.remat])

  kv: PyTree = None if cache is None else (cache["key"], cache["value"])
  parts, begin = [], 0
  for stack in stacks:
    n = jax.tree.leaves(stack)[0].shape[0]
    part = jax.tree.map(lambda c, i=begin, n=n: c[i : i + n], kv)
    local = [config.has_window(i) for i in range(begin, begin + n)]
    begin += n
    if not config.scan_layers:
      outs = []
      for one, layer in zip(local, layers.split_stack((stack, part))):
        run = with_remat(functools.partial(run_layer, one))
        x, out = run(x, layer)
        outs.append(out)
      out = jax.tree.map(lambda *ys: jnp.stack(ys), *outs)
    elif len(set(local)) == 1:
      run = with_remat(functools.partial(run_layer, local[0]))
      x, out = jax.lax.scan(run, x, (stack, part))
    else:
      run = with_remat(lambda x, xs: run_layer(xs[0], x, xs[1]))
      x, out = jax.lax.scan(run, x, (jnp.asarray(local), (stack, part)))
    parts.append(out)
  kv = jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)
  x = _norm(config, x, params, "final_norm")
  if output == "logits":
    with jax.named_scope("unembed"):
      x = _unembed(config, params, x)
  if cache is None:
    return x
  return x, {"key": kv[0], "value": kv[1], "index": index + s}
