"""Flags of the scripts: a config file with overrides, and errors in one line.

`--config=FILE.py` names a file with `get_config()`; `--config.FIELD=VALUE`
overrides a field. absl and ml_collections end with a traceback on an unknown
field or a missing file; here every mistake is one line and exit code 2.
"""

from collections.abc import Callable, Sequence
import contextlib
import errno
import importlib.util
import logging
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn
import warnings

from absl import flags
import jax
import ml_collections

from fedfm import errors, interruption, settings

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
_TIMEOUT = flags.DEFINE_integer(
  "initialization_timeout", 300, "Seconds to wait for the other processes."
)
_OVERRIDES: list[tuple[str, str]] = []
EXIT_BAD_INPUT = 2
EXIT_CANNOT_WRITE = 3
EXIT_LOST_PROCESS = 5
EXIT_INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
# A process that is silent for so many seconds is taken for dead by the others.
_HEARTBEAT = 40


def run(main: Callable[..., None], commands: Sequence[str] = ()) -> None:
  """Parses flags and runs `main`; ends with a code that says how it went.

  0 done; 1 a bug, with a traceback; 2 bad input; 3 the disk is full or fails,
  or the memory is full; 4 the loss went wrong; 5 another process was lost; 130
  Ctrl-C and 143 SIGTERM, of a run that saved its state. All but 1 print one
  line.

  Args:
    main: Reads absl flags.
    commands: What the one argument that is not a flag may be; `main` is given
      it. None takes no such argument.
  """
  _open_standard_streams()
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  logging.getLogger("fedfm").setLevel(logging.INFO)
  # Orbax leaves these behind where a file of a checkpoint is damaged.
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", "coroutine .* was never awaited")
  sys.unraisablehook = _without_closed_loops(sys.unraisablehook)
  try:
    if {"-h", "--help"} & set(sys.argv[1:]):
      show(sys.modules[main.__module__].__doc__)
      show(flags.FLAGS.main_module_help())
      return
    argv = flags.FLAGS(_take_overrides(sys.argv))
    arguments = _check_commands(argv[1:], commands)
    _start_processes()
    main(*arguments)
  except flags.Error as e:
    _leave(EXIT_BAD_INPUT, f"error: {e}")
  except errors.FedFMError as e:
    _leave(e.exit_code, f"error: {e}")
  except interruption.Stopped as e:
    # The others stop at the same round: all shut down together.
    _print_error(str(e))
    sys.exit(128 + e.signum)
  except KeyboardInterrupt:
    _leave(EXIT_INTERRUPTED, "interrupted")
  except MemoryError as e:
    _leave(EXIT_CANNOT_WRITE, f"error: out of memory: {e}")
  except jax.errors.JaxRuntimeError as e:
    if _has_peers():
      _leave(EXIT_LOST_PROCESS, f"error: another process was lost: {e}")
    raise
  except Exception as e:
    if isinstance(e, OSError) and (e.filename or e.errno in _FULL):
      code = EXIT_CANNOT_WRITE if e.errno in _FULL else EXIT_BAD_INPUT
      _leave(code, f"error: {e.filename or 'a file'}: {e.strerror}")
    if not _has_peers():
      raise
    traceback.print_exc()
    _leave(1, "error: this process failed")


def show(text: Any) -> None:
  """Prints to standard output, if someone still reads it.

  Args:
    text: What to print.

  Raises:
    SaveError: It goes to a file on a full disk.
  """
  try:
    print(text, flush=True)
  except UnicodeEncodeError:
    show(str(text).encode("ascii", "backslashreplace").decode())
  except (OSError, ValueError) as e:
    # A closed pipe is no mistake, and Python would complain of it at the end.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(e, OSError) and e.errno in _FULL:
      raise errors.SaveError(f"standard output: {e.strerror}") from None


def check_path(flag: str, path: str) -> pathlib.Path:
  """Refuses a path that no file can have.

  Args:
    flag: Its name, such as "--workdir".
    path: Its value.

  Returns:
    The path.

  Raises:
    ConfigError: It is too long, for example.
  """
  with errors.at(flag, path, (errors.ConfigError,)):
    errors.check_path(path)
  return pathlib.Path(path)


def _open_standard_streams() -> None:
  """Opens 0, 1 and 2 where they are closed.

  Else the next files that are opened get these numbers, and what libraries
  print goes into them.
  """
  for descriptor in range(3):
    try:
      os.fstat(descriptor)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # Gets the lowest number that is free.


def _check_commands(
  arguments: Sequence[str], commands: Sequence[str]
) -> Sequence[str]:
  if commands and not arguments:
    raise errors.ConfigError(
      f"arguments: got no command, expected one of {', '.join(commands)}"
    )
  if commands and arguments[0] not in commands:
    raise errors.ConfigError(
      f"arguments: got {arguments[0]!r}{errors.nearest(arguments[0], commands)}"
    )
  if len(arguments) > bool(commands):
    raise errors.ConfigError(
      f"arguments: {arguments[bool(commands)]!r} is not a flag"
    )
  return arguments


def _has_peers() -> bool:
  return jax.distributed.is_initialized() and jax.process_count() > 1


def _leave(code: int, message: str) -> NoReturn:
  """Prints one line and ends this process, in time even without the others."""
  _print_error(message)
  if not _has_peers():
    sys.exit(code)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      stream.flush()
  if jax.process_index() == 0:
    time.sleep(3)  # It holds the connection of the others, who leave too.
  os._exit(code)  # An orderly end would wait for all processes.


def _without_closed_loops(hook: Callable[..., None]) -> Callable[..., None]:
  """Says nothing of a file that is read on after its neighbour's error."""

  def without(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      hook(unraisable)

  return without


def _print_error(message: str) -> None:
  with contextlib.suppress(OSError, ValueError, AttributeError):
    print(" ".join(message.split()), file=sys.stderr, flush=True)


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
  coordinator, count, index = given
  if count is not None and count < 1:
    raise errors.ConfigError(
      f"--num_processes: got {count}, expected at least 1"
    )
  if count is not None and index is not None and not 0 <= index < count:
    raise errors.ConfigError(
      f"--process_id: got {index}, expected 0 to {count - 1}"
    )
  if coordinator is not None:
    _check_coordinator(coordinator, index == 0)
  who = "a process" if index is None else f"process {index} of {count}"
  where = f" at {coordinator}" if coordinator else ""
  _print_error(f"{who} joins the others{where}")
  # At its own time-out jax aborts, with a stack trace: be done before.
  limit = threading.Timer(_TIMEOUT.value, _not_all_joined, [who, where])
  limit.daemon = True
  limit.start()
  try:
    jax.distributed.initialize(
      *given,
      initialization_timeout=_TIMEOUT.value + 60,
      heartbeat_timeout_seconds=_HEARTBEAT,
    )
  except (RuntimeError, ValueError) as e:
    raise errors.ConfigError(f"--distributed: {e}") from None
  finally:
    limit.cancel()


def _not_all_joined(who: str, where: str) -> None:
  """Ends this process, which waits in vain, whatever it is in."""
  _print_error(
    f"error: --process_id: {who}{where} waited {_TIMEOUT.value} s for the "
    "others: one is missing, or two have the same id, or --num_processes is "
    "larger than what was started"
  )
  os._exit(EXIT_BAD_INPUT)


def _check_coordinator(address: str, is_first: bool) -> None:
  """Tells a wrong address from a slow start: jax would abort, or only wait."""
  host, colon, port = address.rpartition(":")
  is_number = port.isascii() and port.isdecimal()
  if not host or not colon or not is_number or not 0 < int(port) < 2**16:
    raise errors.ConfigError(
      f"--coordinator: got {address!r}, expected host:port"
    )
  if is_first:
    try:
      socket.create_server(("", int(port))).close()
    except OSError as e:
      raise errors.ConfigError(
        f"--coordinator: port {port} cannot be opened here: "
        f"{os.strerror(e.errno or 0)}"
      ) from None
    return
  deadline = time.monotonic() + _TIMEOUT.value
  while True:
    try:
      socket.create_connection((host, int(port)), timeout=5).close()
      return
    except OSError as e:
      if time.monotonic() > deadline:
        raise errors.ConfigError(
          f"--coordinator: nothing answers at {address} within "
          f"{_TIMEOUT.value} s: {e.strerror or e}"
        ) from None
    time.sleep(0.2)


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
  return overrides(read_config(path))


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


def raw_overrides() -> list[tuple[str, str]]:
  """Returns (field, text) as the command line gives them, for a child of it."""
  return list(_OVERRIDES)


def read_config(path: str) -> dict[str, Any]:
  """Runs a config file, without the overrides of the command line.

  Args:
    path: A Python file whose `get_config()` returns a `ConfigDict`.

  Returns:
    Its fields, a nested dict.

  Raises:
    ConfigError: A missing, empty or failing file.
  """
  file = check_path("--config", path)
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
