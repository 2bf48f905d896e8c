"""Equal clients as shapes, without the data that their rows are made of."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedfm import clients, errors, models, types
from fedfm.data import layout as layout_lib
from fedfm.data import packing
from fedfm.settings import DataSettings, Settings

# Of each field of a batch: the shape of a row, and its dtype.
Rows = dict[str, tuple[tuple[int, ...], Any]]


class Layout(NamedTuple):
  """How a cohort of equal clients lies on lanes.

  Attributes:
    num_clients: Clients of a round.
    lanes: Lanes.
    slots: Clients that a lane runs one after the other.
    local_steps: Steps of a client.
    rows: Rows of a local step.
    length: Units of a row: of language models its tokens, else 1.
    unit: What is counted: "tokens", or "examples".
  """

  num_clients: int
  lanes: int
  slots: int
  local_steps: int
  rows: int
  length: int
  unit: str = "tokens"

  @property
  def num_rows(self) -> int:
    """Rows of a round that count."""
    return self.num_clients * self.local_steps * self.rows

  @property
  def units(self) -> int:
    """Units of a round that count."""
    return self.num_rows * self.length

  @property
  def run_share(self) -> float:
    """What runs over what counts: lanes wait for the longest."""
    return self.lanes * self.slots / self.num_clients


def lay_out(
  settings: Settings, algorithm: types.FederatedAlgorithm, mesh: Mesh
) -> Layout:
  """Lays equal clients out, as `data.pack` would.

  Args:
    settings: The run's settings.
    algorithm: May say how many steps a client takes, and keep it in its place.
    mesh: The mesh.

  Returns:
    The `Layout`.

  Raises:
    ConfigError: Lanes that do not divide, or a number of steps that is not
      said.
  """
  c, num_clients = settings.client, settings.clients_per_round
  steps = c.local_steps
  if algorithm.local_steps is not None:
    steps = algorithm.local_steps(0)
  if not steps:
    if not c.max_examples:
      raise errors.ConfigError(
        "client.local_steps: got 0, expected the steps of a client (or "
        "client.max_examples), as there is no data to count"
      )
    steps = packing.steps_per_client(c.max_examples, c.batch_size, c.epochs)
  lanes = settings.lanes
  if lanes == "auto":
    rows = num_clients if algorithm.aligned else None
    lanes = layout_lib.auto_lanes(
      [steps] * num_clients, mesh.shape["clients"], False, rows
    )
  lanes = int(lanes)
  clients.check_lanes(lanes, mesh)
  if algorithm.aligned:
    layout_lib.align([], num_clients, lanes)  # Raises where it can't be.
  of_tokens = settings.data.task == "language_model"
  return Layout(
    num_clients=num_clients,
    lanes=lanes,
    slots=-(-num_clients // lanes),
    local_steps=steps,
    rows=c.batch_size,
    length=settings.data.sequence_length if of_tokens else 1,
    unit="tokens" if of_tokens else "examples",
  )


def rows(data: DataSettings, config: Any) -> Rows:
  """Says what a row of the data holds, as `population.load` makes it.

  Args:
    data: The task, and how long a text is.
    config: The model's, which has the size of an image.

  Returns:
    `Rows`; TFDS's fields that no loss reads are left out.
  """
  i32, f32 = jnp.int32, jnp.float32
  text = (data.sequence_length,)
  fields: Rows = {}
  if data.image_key:
    fields["x"] = (models.image_shape(config), f32)
  if data.task == "language_model":
    fields |= {"tokens": (text, i32), "loss_mask": (text, f32)}
    if not data.token_key:
      fields["num_bytes"] = ((), i32)
    if data.prompt_key and not data.token_key:
      fields |= {"segment_ids": (text, i32), "positions": (text, i32)}
  elif data.task == "contrastive" or not data.image_key:
    fields |= {"tokens": (text, i32), "token_mask": (text, f32)}
  if data.task == "classification":
    fields["label"] = ((), i32)
  return fields


def cohort(
  layout: Layout, row_fields: Rows, mesh: Mesh, aligned: bool
) -> types.Cohort:
  """A cohort's shapes, with their shardings.

  Args:
    layout: From `lay_out`.
    row_fields: From `rows`.
    mesh: The mesh.
    aligned: Whether every client keeps its place on the lanes.

  Returns:
    A `Cohort` of `jax.ShapeDtypeStruct`.
  """
  steps = layout.slots * layout.local_steps
  on_lane, on_slot = (layout.lanes, steps), (layout.lanes, layout.slots)
  batch = (*on_lane, layout.rows)
  i32, f32 = jnp.int32, jnp.float32
  fields: dict[str, Any] = {
    "batches": {
      "mask": (batch, f32),
      **{k: ((*batch, *shape), t) for k, (shape, t) in row_fields.items()},
    },
    "slot": (on_lane, i32),
    "start": (on_lane, jnp.bool_),
    "end": (on_lane, jnp.bool_),
    "boundaries": ((steps + 1,), i32),
    "num_segments": ((), i32),
    "id_hash": ((*on_slot, 2), jnp.uint32),
    "row": (on_slot, i32),
    "num_examples": (on_slot, i32),
    "num_steps": (on_slot, i32),
    "weight": (on_slot, f32),
    "rate": (on_slot, f32),
    "order": ((layout_lib.bucket(layout.num_clients),), i32),
  }
  places = clients.cohort.shardings(mesh)

  def shape(leaf, place) -> Any:
    if isinstance(leaf, dict):
      return {k: shape(x, place) for k, x in leaf.items()}
    return jax.ShapeDtypeStruct(*leaf, sharding=place)

  return types.Cohort(
    **{name: shape(leaf, places[name]) for name, leaf in fields.items()},
    aligned=aligned,
  )
