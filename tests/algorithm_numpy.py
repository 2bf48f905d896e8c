"""Two rounds of every algorithm's paper, by hand in NumPy float64.

On the linear problem of `algorithm_cases`; weights are [w, b], one vector of 4.
Nothing here is fedfm's but the examples.
"""

import algorithm_cases as cases
import numpy as np

ETA, POPULATION = cases.RATE, len(cases.IDS)
START = np.array([0.5, -0.2, 0.1, 0.0])


def examples(client):
  """A client's rows [n, 4], a one appended for b, and targets."""
  read = cases.LINEAR.read(client)
  x = np.concatenate([read["x"], np.ones((len(read["y"]), 1))], axis=1)
  return x, read["y"]


def batches(client):
  """Its local steps: every epoch in stored order, the last batch partial."""
  x, y = examples(client)
  for _ in range(cases.EPOCHS):
    for at in range(0, len(x), cases.BATCH):
      yield x[at : at + cases.BATCH], y[at : at + cases.BATCH]


def gradient(w, x, y):
  return 2 * x.T @ (x @ w - y) / len(y)


def loss(w, client):
  x, y = examples(client)
  return np.mean((x @ w - y) ** 2)


def descend(w, client, change=lambda g, w: g):
  """Local SGD on what `change` makes of the gradients: (w, K)."""
  steps = 0
  for x, y in batches(client):
    w = w - ETA * change(gradient(w, x, y), w)
    steps += 1
  return w, steps


def shares(ids):
  sizes = np.array([cases.LINEAR.size(i) for i in ids])
  return sizes / sizes.sum()


def number(client):
  return cases.IDS.index(client)


def fedavg(mu=0.0, epsilon=1.0, weigh=shares):
  w = START
  for ids in cases.ROUNDS:
    deltas = [
      descend(w, i, lambda g, v, w=w: g + mu * (v - w))[0] - w for i in ids
    ]
    w = w + epsilon * weigh(ids) @ np.stack(deltas)
    yield {"w": w}


def uniform(ids):
  return np.full(len(ids), 1 / len(ids))


def server(step):
  """FedOpt: `step(delta, m, v, t) -> (what is added to w, m, v)`."""
  w, m, v = START, np.zeros(4), np.full(4, np.nan)
  for t, ids in enumerate(cases.ROUNDS, start=1):
    deltas = np.stack([descend(w, i)[0] - w for i in ids])
    add, m, v = step(shares(ids) @ deltas, m, v, t)
    w = w + add
    yield {"w": w}


TAU, SERVER_RATE, BETA1, BETA2 = 1e-3, 0.1, 0.9, 0.99


def fedavgm(delta, m, v, t):
  m = 0.9 * m + delta
  return m, m, v


def fedadagrad(delta, m, v, t):
  v = (TAU**2 if t == 1 else v) + delta**2
  return SERVER_RATE * delta / (np.sqrt(v) + TAU), m, v


def fedadam(delta, m, v, t):
  m = BETA1 * m + (1 - BETA1) * delta
  v = BETA2 * (TAU**2 if t == 1 else v) + (1 - BETA2) * delta**2
  return SERVER_RATE * m / (np.sqrt(v) + TAU), m, v


def fedyogi(delta, m, v, t):
  m = BETA1 * m + (1 - BETA1) * delta
  v = np.full(4, TAU**2) if t == 1 else v
  v = v - (1 - BETA2) * delta**2 * np.sign(v - delta**2)
  return SERVER_RATE * m / (np.sqrt(v) + TAU), m, v


def adam_of_optax(delta, m, v, t):
  """With bias correction, v from 0."""
  m = BETA1 * m + (1 - BETA1) * delta
  v = 0.999 * (0 if t == 1 else v) + 0.001 * delta**2
  m_hat, v_hat = m / (1 - BETA1**t), v / (1 - 0.999**t)
  return SERVER_RATE * m_hat / (np.sqrt(v_hat) + 1e-8), m, v


def adagrad_of_optax(delta, m, v, t):
  """The sum of squares starts at 0.1, epsilon is inside of the root."""
  v = (0.1 if t == 1 else v) + delta**2
  return SERVER_RATE * delta / np.sqrt(v + 1e-7), m, v


def yogi_of_optax(delta, m, v, t):
  """Both moments start at 1e-6 and are corrected for bias all the same."""
  m = BETA1 * (1e-6 if t == 1 else m) - (1 - BETA1) * delta
  v = np.full(4, 1e-6) if t == 1 else v
  v = v - 0.001 * delta**2 * np.sign(v - delta**2)
  m_hat, v_hat = m / (1 - BETA1**t), v / (1 - 0.999**t)
  return -SERVER_RATE * m_hat / (np.sqrt(v_hat) + 1e-3), m, v


def scaffold():
  w, c, c_i = START, np.zeros(4), np.zeros((POPULATION, 4))
  for ids in cases.ROUNDS:
    deltas, changes = [], []
    for i in ids:
      old = c_i[number(i)].copy()
      w_i, k = descend(w, i, lambda g, v, old=old, c=c: g - old + c)
      new = old - c + (w - w_i) / (k * ETA)
      c_i[number(i)] = new
      deltas.append(w_i - w)
      changes.append(new - old)
    w = w + shares(ids) @ np.stack(deltas)
    c = c + len(ids) / POPULATION * np.mean(changes, axis=0)
    yield {"w": w, "clients": c_i.copy(), "extra": c}


def fednova():
  w = START
  for ids in cases.ROUNDS:
    p, taus, d = shares(ids), [], []
    for i in ids:
      w_i, tau = descend(w, i)
      taus.append(tau)
      d.append(-(w_i - w) / (tau * ETA))
    w = w - p @ np.array(taus) * ETA * (p @ np.stack(d))
    yield {"w": w}


def feddyn(alpha):
  w, h, h_i = START, np.zeros(4), np.zeros((POPULATION, 4))
  for ids in cases.ROUNDS:
    deltas = []
    for i in ids:
      own = h_i[number(i)].copy()
      w_i, _ = descend(
        w, i, lambda g, v, own=own, w=w: g - own + alpha * (v - w)
      )
      h_i[number(i)] = own - alpha * (w_i - w)
      deltas.append(w_i - w)
    h = h - alpha * np.sum(deltas, axis=0) / POPULATION
    w = w + shares(ids) @ np.stack(deltas) - h / alpha
    yield {"w": w, "clients": h_i.copy(), "extra": h}


def mimelite(beta):
  w, m = START, np.zeros(4)
  for ids in cases.ROUNDS:
    ends = [descend(w, i, lambda g, v, m=m: g + beta * m)[0] for i in ids]
    gradients = [gradient(w, *examples(i)) for i in ids]
    m = shares(ids) @ np.stack(gradients) + beta * m
    w = w + shares(ids) @ (np.stack(ends) - w)
    yield {"w": w, "extra": m}


def qfedavg(q):
  w, lipschitz = START, 1 / ETA
  for ids in cases.ROUNDS:
    top, bottom = np.zeros(4), 0.0
    for i, p in zip(ids, shares(ids)):
      f = loss(w, i)
      step = lipschitz * (w - descend(w, i)[0])
      top = top + p * f**q * step
      bottom += p * (q * f ** (q - 1) * step @ step + lipschitz * f**q)
    w = w - top / bottom
    yield {"w": w}


def nearest_in_simplex(x):
  """By bisection on what is taken from every entry."""
  low, high = x.min() - 1, x.max()
  for _ in range(200):
    middle = (low + high) / 2
    if np.maximum(x - middle, 0).sum() > 1:
      low = middle
    else:
      high = middle
  return np.maximum(x - high, 0)


def afl(rate):
  w, mixture = START, np.full(POPULATION, 1 / POPULATION)
  for ids in cases.ROUNDS:
    rows = [number(i) for i in ids]
    own = mixture[rows] / mixture[rows].sum()
    losses = np.array([loss(w, i) for i in ids])
    w = w + own @ np.stack([descend(w, i)[0] - w for i in ids])
    mixture = mixture.copy()
    mixture[rows] += rate * POPULATION / len(ids) * losses
    mixture = nearest_in_simplex(mixture)
    yield {"w": w, "extra": mixture}


def fedbuff(rounds=cases.ROUNDS, max_delay=8):
  """Client number n arrives n steps late, or as late as there were steps."""
  models = [START]
  for ids in rounds:
    deltas = []
    for i in ids:
      tau = min(number(i), len(models) - 1, max_delay)
      sent = models[-1 - tau]
      deltas.append((descend(sent, i)[0] - sent) / np.sqrt(1 + tau))
    models.append(models[-1] + np.mean(deltas, axis=0))
    yield {"w": models[-1]}


def fedper():
  """b, the last weight, is private."""
  w, private = START, np.zeros(POPULATION)
  for ids in cases.ROUNDS:
    ends = []
    for i in ids:
      end, _ = descend(np.append(w[:3], private[number(i)]), i)
      private[number(i)] = end[3]
      ends.append(end[:3])
    w = np.append(shares(ids) @ np.stack(ends), w[3])
    yield {"w": w, "clients": private.copy()}


def fedrep(local_share):
  w, private = START, np.zeros(POPULATION)
  for ids in cases.ROUNDS:
    ends = []
    for i in ids:
      own = np.append(w[:3], private[number(i)])
      steps = list(batches(i))
      turn = int(np.floor(local_share * len(steps)))
      for k, (x, y) in enumerate(steps):
        trained = np.array([0, 0, 0, 1] if k < turn else [1, 1, 1, 0])
        own = own - ETA * trained * gradient(own, x, y)
      private[number(i)] = own[3]
      ends.append(own[:3])
    w = np.append(shares(ids) @ np.stack(ends), w[3])
    yield {"w": w, "clients": private.copy()}


def ditto(lam):
  own = np.tile(START, (POPULATION, 1))
  sent = START
  for result, ids in zip(fedavg(), cases.ROUNDS):
    for i in ids:
      own[number(i)], _ = descend(
        own[number(i)], i, lambda g, v, w=sent: g + lam * (v - w)
      )
    sent = result["w"]
    yield {"w": sent, "clients": own.copy()}


def per_fedavg(alpha, first_order=False):
  """The Hessian of the loss on half a batch is 2 x'x / n."""
  w = START
  for ids in cases.ROUNDS:
    ends = []
    for i in ids:
      own = w
      for x, y in batches(i):
        one, two = slice(0, None, 2), slice(1 if len(y) > 1 else 0, None, 2)
        hessian = 2 * x[one].T @ x[one] / len(y[one])
        adapted = own - alpha * gradient(own, x[one], y[one])
        g = gradient(adapted, x[two], y[two])
        own = own - ETA * (g if first_order else g - alpha * hessian @ g)
      ends.append(own)
    w = shares(ids) @ np.stack(ends)
    yield {"w": w}


def ifca(models):
  """From the given first models [k, 4]."""
  cluster_of = np.full(POPULATION, -1)
  for ids in cases.ROUNDS:
    sums, weights = np.zeros_like(models), np.zeros(len(models))
    for i in ids:
      x, y = next(batches(i))
      j = int(np.argmin([np.mean((x @ w - y) ** 2) for w in models]))
      cluster_of[number(i)] = j
      size = cases.LINEAR.size(i)
      sums[j] += size * (descend(models[j], i)[0] - models[j])
      weights[j] += size
    models = models + sums / np.where(weights, weights, 1)[:, None]
    yield {"w": models, "clients": cluster_of.copy(), "extra": weights}


# By the names and options of `algorithm_cases.CASES`.
ROUNDS_OF = {
  "fedavg": fedavg,
  "fedprox": lambda: fedavg(mu=0.3),
  "fedavgm": lambda: server(fedavgm),
  "fedadagrad": lambda: server(fedadagrad),
  "fedadam": lambda: server(fedadam),
  "fedyogi": lambda: server(fedyogi),
  "fedopt": lambda: server(adam_of_optax),
  "scaffold": scaffold,
  "fednova": fednova,
  "feddyn": lambda: feddyn(0.2),
  "mimelite": lambda: mimelite(0.5),
  "qfedavg": lambda: qfedavg(2.0),
  "afl": lambda: afl(0.05),
  "fedbuff": fedbuff,
  "fedper": fedper,
  "fedbn": fedper,
  "fedrep": lambda: fedrep(0.4),
  "ditto": lambda: ditto(0.7),
  "per_fedavg": lambda: per_fedavg(0.1),
  "first_order_per_fedavg": lambda: per_fedavg(0.1, first_order=True),
  "reptile": lambda: fedavg(epsilon=0.5, weigh=uniform),
}
