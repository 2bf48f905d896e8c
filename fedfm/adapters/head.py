"""Training the end of the model only."""

from fedfm import errors
from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter
from fedfm.models.model import Model

_NORM = ("final_norm", "final_norm_bias")


def head(model: Model) -> Adapter:
  """Trains the final norm and the output head; tied heads are untied first.

  Args:
    model: A decoder.

  Returns:
    An `Adapter` whose trainable is {"final_norm", "lm_head"}, and
    "final_norm_bias" where the norm has one.

  Raises:
    ConfigError: The model has no `final_norm` and `embed` or `lm_head`.
  """
  names = set(model.shapes) if isinstance(model.shapes, dict) else set()
  if "final_norm" not in names or not names & {"embed", "lm_head"}:
    raise errors.ConfigError(
      "adapter: 'head' needs parameters 'final_norm' and 'lm_head' or "
      f"'embed', got {sorted(names)}"
    )

  def init(key, params):
    del key
    lm_head = params["lm_head"] if "lm_head" in params else params["embed"].T
    norm = {k: params[k] for k in _NORM if k in params}
    return adapter_lib.own(norm | {"lm_head": lm_head})

  def bind(params, trainable):
    return {**params, **trainable}

  known = model.axes
  axes = {k: known[k] for k in _NORM if k in known}
  axes["lm_head"] = known.get("lm_head") or known["embed"][::-1]
  return adapter_lib.make_adapter(
    model, init=init, bind=bind, merge=bind, kind="head", axes=axes
  )
