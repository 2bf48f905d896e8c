"""Flags of the scripts: a config file with overrides, and errors in one line.

`--config=FILE.py` names a file with `get_config()`; `--config.FIELD=VALUE`
overrides a field. absl and ml_collections end with a traceback on an unknown
field or a missing file; here every mistake is one line and exit code 2.
"""

from collections.abc import Callable, Sequence
import importlib.util
import logging
import pathlib
import sys
from typing import Any

from absl import flags
import jax
import ml_collections

from fedfm import errors, settings

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Run as one of several processes; TPU pods, SLURM and GKE are detected.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0, where it is not detected."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Processes, where that is not detected."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "This process, where that is not detected."
)
_OVERRIDES: list[tuple[str, str]] = []
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run(main: Callable[[], None]) -> None:
  """Parses flags and runs `main()`; bad input ends with exit code 2.

  Args:
    main: Reads absl flags.
  """
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  logging.getLogger("fedfm").setLevel(logging.INFO)
  try:
    if {"-h", "--help"} & set(sys.argv[1:]):
      print(sys.modules[main.__module__].__doc__)
      print(flags.FLAGS.main_module_help())
      return
    argv = flags.FLAGS(_take_overrides(sys.argv))
    if len(argv) > 1:
      raise errors.ConfigError(f"arguments: {argv[1]!r} is not a flag")
    _start_processes()
    main()
  except (flags.Error, errors.FedFMError) as e:
    _bad_input(e)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(EXIT_INTERRUPTED)


def _start_processes() -> None:
  """Joins the other processes, before anything else touches jax."""
  given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if not _DISTRIBUTED.value and given == (None, None, None):
    return
  if given != (None, None, None) and None in given:
    raise errors.ConfigError(
      "--coordinator, --num_processes and --process_id go together, got "
      f"{given}"
    )
  _, count, index = given
  if count is not None and index is not None and not 0 <= index < count:
    raise errors.ConfigError(
      f"--process_id: got {index}, expected 0 to {count - 1}"
    )
  try:
    jax.distributed.initialize(*given)
  except (RuntimeError, ValueError) as e:
    raise errors.ConfigError(f"--distributed: {e}") from None


def _bad_input(error: Exception) -> None:
  message = " ".join(str(error).split())
  print(f"error: {message}", file=sys.stderr)
  sys.exit(EXIT_BAD_INPUT)


def _take_overrides(argv: Sequence[str]) -> list[str]:
  """Takes `--config.FIELD=VALUE` (or `VALUE` after a space) out of argv."""
  rest, i = [], 0
  while i < len(argv):
    arg = argv[i]
    if arg.startswith(("--config.", "-config.")):
      field, equals, value = arg.lstrip("-").partition("=")
      if not equals:
        i += 1
        if i == len(argv):
          raise errors.ConfigError(f"--{field}: got no value")
        value = argv[i]
      _OVERRIDES.append((field.removeprefix("config."), value))
    else:
      rest.append(arg)
    i += 1
  return rest


def load_config(path: str) -> dict[str, Any]:
  """Loads a config file and applies the overrides of the command line.

  Args:
    path: A Python file whose `get_config()` returns a `ConfigDict`.

  Returns:
    A nested dict of fields for `settings.from_dict`.

  Raises:
    ConfigError: A missing, empty or failing file, an unknown field, or a value
      of another type.
  """
  return overrides(_read(path))


def overrides(config: dict[str, Any] | None = None) -> dict[str, Any]:
  """Sets the fields that the command line gives.

  Args:
    config: A nested dict of fields, changed in place; default an empty one.

  Returns:
    The dict.

  Raises:
    ConfigError: An unknown field, or a value of another type.
  """
  config = {} if config is None else config
  for field, text in _OVERRIDES:
    kind = settings.field_type(field)
    is_group = hasattr(kind, "__dataclass_fields__")
    value = text if is_group else settings.convert(text, kind, field)
    group = config
    *parents, name = field.split(".")
    for parent in parents:
      group = group.setdefault(parent, {})
      if not isinstance(group, dict):
        raise errors.ConfigError(
          f"{field}: the config has {parent} = {group!r}, expected fields"
        )
    group[name] = value
  return config


def _read(path: str) -> dict[str, Any]:
  file = pathlib.Path(path)
  if not file.is_file():
    raise errors.ConfigError(f"--config: {path!r} is not a file")
  if file.suffix != ".py":
    raise errors.ConfigError(f"--config: {path}, expected a .py file")
  spec = importlib.util.spec_from_file_location("fedfm_config", file)
  assert spec is not None and spec.loader is not None  # It ends in .py.
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise errors.ConfigError(f"--config: {path} has no get_config()")
    config = module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
      raise errors.ConfigError(
        f"--config: get_config() of {path} returned "
        f"{type(config).__name__}, expected a ConfigDict"
      )
    return config.to_dict()
  except errors.FedFMError:
    raise
  except (Exception, SystemExit) as e:  # A config file is the user's own code.
    raise errors.ConfigError(
      f"--config: {path} failed: {type(e).__name__}: {e}"
    ) from None
