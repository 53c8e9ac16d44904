"""Features of images by a frozen encoder that has seen no label.

The encoder is that of :mod:`emc2.experiments.contrastive` for scikit-learn's
digits, trained by SimCLR: two views of an image are to be alike.
"""

from typing import NamedTuple

import numpy as np
from etils import epath

from emc2.experiments import contrastive, evaluate

NUM_CLASSES = 10


class Features(NamedTuple):
  """Rows of a split, of mean 0 and variance 1 on the images to train on."""

  rows: np.ndarray  # (n, d + 1), float64; the last is 1 for all.
  labels: np.ndarray  # (n,), int32.


def extract(
  workdir: epath.PathLike, *, num_epochs: int, seed: int
) -> tuple[Features, Features]:
  """Trains the encoder, or takes it from its folder, and freezes it.

  Args:
    workdir: Of the encoder.
    num_epochs: At least 1, through 1,437 images.
    seed: At least 0.

  Returns:
    The features of the images to train on, and of the 360 to test on.
  """
  config = contrastive.resolve(
    contrastive.Config(
      method='simclr',
      num_seeds=1,
      seed=seed,
      batch_size=64,
      num_epochs=num_epochs,
      steps_per_call=11,  # Of the 22 of an epoch.
      log_every=11,
      checkpoint_every=1_100,
      num_evaluations=1,
      exact=0,  # No gradient is compared with that of all pairs.
    )
  )
  task = contrastive.open_task(config)
  method = contrastive.make_method(task, 'simclr')
  state = contrastive.train(task, method, seed, workdir)
  rows, labels = [], []
  for split in ('train', 'test'):
    dataset = contrastive.data_lib.open(
      config.data, split, memory_limit=config.memory_limit
    )
    found = evaluate.extract_features(
      task.encoder.apply_features,
      state.params,
      dataset.images,
      batch_size=180,
    )
    rows.append(found.astype(np.float64))
    labels.append(dataset.labels)
  mean, scale = rows[0].mean(axis=0), rows[0].std(axis=0)
  # What is the same for all images tells nothing, and may not be divided by.
  kept = scale > 1e-6 * scale.max()

  def finish(part):
    part = (part[:, kept] - mean[kept]) / scale[kept]
    return np.pad(part, ((0, 0), (0, 1)), constant_values=1.0)

  train, test = map(finish, rows)
  return Features(train, labels[0]), Features(test, labels[1])
