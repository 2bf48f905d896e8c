"""What a family is: an architecture's names, sizes and layouts as tables."""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any, NamedTuple

from fedfm import errors
from fedfm.models.decoder_config import DecoderConfig

REQUIRED = object()
# Their name of an activation -> ours; a family writes its own name first.
ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "relu": "relu",
}


class TensorRow(NamedTuple):
  """One parameter: our path, the file's name, and how they differ.

  Rows that name the same tensor are its parts: they lie one after the other
  along our last dimension, in the order of the table.

  Attributes:
    path: Path in our tree, such as "layers/q_proj".
    name: Name in the file; "{i}" stands for the layer, and layers are stacked.
    transpose: Whether the file has [out, in] where we have [in, out].
  """

  path: str
  name: str
  transpose: bool = False


class FieldRow(NamedTuple):
  """One field of config.json.

  Attributes:
    name: Its name there.
    field: Ours in the model's config.
    kind: Its type.
    default: Its value when absent.
    nullable: Whether null is a value; where not, it means the default.
  """

  name: str
  field: str
  kind: type
  default: Any = REQUIRED
  nullable: bool = False


class Fields:
  """The fields of a config.json; reading one of a wrong type raises."""

  def __init__(
    self, path: pathlib.Path, values: Mapping[str, Any], inside: str = ""
  ):
    """Wraps an object.

    Args:
      path: The file, for messages.
      values: The object.
      inside: What comes before a field's name in messages.
    """
    self.path, self.values, self._inside = path, values, inside

  def get(
    self,
    name: str,
    kind: type,
    default: Any = REQUIRED,
    *,
    nullable: bool = False,
  ) -> Any:
    """Returns one field.

    Args:
      name: Its name.
      kind: int, float, bool, str, list or dict.
      default: Its value when absent; without one it is required.
      nullable: Whether null is returned as None; otherwise it is as if absent.

    Raises:
      CheckpointError: It is missing, or of another type.
    """
    value = self.values.get(name)
    if value is None:
      if nullable and name in self.values:
        return None
      if default is REQUIRED:
        raise self.error(f"{name} is missing")
      return default
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds:
      raise self.error(f"{name} is {value!r}, expected {kind.__name__}")
    return kind(value)

  def error(self, message: str) -> errors.CheckpointError:
    """Builds the error to raise; it names the file."""
    return errors.CheckpointError(f"{self.path}: {self._inside}{message}")


def _nothing(_: Any) -> dict[str, Any]:
  return {}


class Family(NamedTuple):
  """An architecture's file format.

  Attributes:
    architecture: Its name in `architectures`.
    model_type: `model_type` in config.json.
    tensors: The parameters.
    fields: The fields that are options of the config by another name.
    activation: The field that names the activation, and its default; None
      where `read` says it.
    options: Options of the config that all its models have.
    fixed: Fields of config.json that may have this value only.
    read: `read(fields) -> options`, for what the tables cannot say.
    write: `write(config) -> fields`, the other way.
    prefix: Of the tensors' names; files of a model without its head lack it.
    ignored: Pattern of names, without the prefix, that hold no parameter.
    heads: Pattern of names of heads, which are left out, with a warning, where
      the family is of the model without one.
    renamed: Ends of names in old files -> as they are now.
    config: The type of its models' configs.
    classifier: The architecture that has its layers and a classifier; "" where
      there is none.
  """

  architecture: str
  model_type: str
  tensors: Sequence[TensorRow]
  fields: Sequence[FieldRow]
  activation: tuple[str, str] | None = ("hidden_act", "silu")
  options: Mapping[str, Any] = {}
  fixed: Mapping[str, Any] = {}
  read: Callable[[Fields], dict[str, Any]] = _nothing
  write: Callable[[Any], dict[str, Any]] = _nothing
  prefix: str = "model."
  ignored: str = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
  heads: str = ""
  renamed: Mapping[str, str] = {}
  config: type = DecoderConfig
  classifier: str = ""

  @property
  def is_bare(self) -> bool:
    """Whether it is of a model without a head, whose names lack the prefix."""
    return not any(row.name.startswith(self.prefix) for row in self.tensors)
