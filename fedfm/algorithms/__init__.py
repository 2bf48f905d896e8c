"""Federated algorithms, one file a paper."""

from fedfm.algorithms.afl import afl
from fedfm.algorithms.algorithm import Server, federated, many_rounds
from fedfm.algorithms.averaging import averaged
from fedfm.algorithms.diloco import diloco, outer_optimizer
from fedfm.algorithms.ditto import ditto
from fedfm.algorithms.fedavg import fedavg
from fedfm.algorithms.fedbuff import fedbuff
from fedfm.algorithms.feddpa import feddpa_f, feddpa_t
from fedfm.algorithms.feddyn import feddyn
from fedfm.algorithms.fedex_lora import fedex_lora
from fedfm.algorithms.fedit import fedit
from fedfm.algorithms.fedkseed import fedkseed
from fedfm.algorithms.fedmezo import fedmezo
from fedfm.algorithms.fednova import fednova
from fedfm.algorithms.fedopt import (
  fedadagrad,
  fedadam,
  fedavgm,
  fedopt,
  fedyogi,
  server_adagrad,
  server_adam,
  server_yogi,
)
from fedfm.algorithms.fedper import fedbn, fedper
from fedfm.algorithms.fedprox import fedprox
from fedfm.algorithms.fedrep import fedrep
from fedfm.algorithms.fedsa_lora import fedsa_lora
from fedfm.algorithms.fedsvd import fedsvd
from fedfm.algorithms.ffa_lora import ffa_lora
from fedfm.algorithms.flexlora import flexlora
from fedfm.algorithms.flora import flora
from fedfm.algorithms.forward_gradients import forward_gradients
from fedfm.algorithms.hetlora import hetlora
from fedfm.algorithms.ifca import ifca
from fedfm.algorithms.mimelite import mimelite
from fedfm.algorithms.per_fedavg import first_order_per_fedavg, per_fedavg
from fedfm.algorithms.photon import photon
from fedfm.algorithms.qfedavg import qfedavg
from fedfm.algorithms.reptile import reptile
from fedfm.algorithms.rolora import rolora
from fedfm.algorithms.scaffold import scaffold
from fedfm.algorithms.streaming_diloco import streaming_diloco
from fedfm.algorithms.zero_padding import zero_padding

__all__ = [
  "Server",
  "afl",
  "averaged",
  "diloco",
  "ditto",
  "fedadagrad",
  "fedadam",
  "fedavg",
  "fedavgm",
  "fedbn",
  "fedbuff",
  "feddpa_f",
  "feddpa_t",
  "feddyn",
  "federated",
  "fedex_lora",
  "fedit",
  "fednova",
  "fedkseed",
  "fedmezo",
  "fedopt",
  "fedper",
  "fedprox",
  "fedrep",
  "fedsa_lora",
  "fedsvd",
  "fedyogi",
  "ffa_lora",
  "first_order_per_fedavg",
  "flexlora",
  "flora",
  "forward_gradients",
  "hetlora",
  "ifca",
  "many_rounds",
  "mimelite",
  "outer_optimizer",
  "per_fedavg",
  "photon",
  "qfedavg",
  "reptile",
  "rolora",
  "scaffold",
  "server_adagrad",
  "server_adam",
  "server_yogi",
  "streaming_diloco",
  "zero_padding",
]
