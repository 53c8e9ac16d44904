"""Trains by EMC² over all devices of a run of processes, from a folder."""

import dataclasses
import json
import sys

import jax
import numpy as np
from etils import epath

from emc2 import mesh as mesh_lib
from emc2.experiments import contrastive


def main(coordinator, num_processes, process_id, folder, settings):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(8 // num_processes)
  if num_processes > 1:
    mesh_lib.start(coordinator, num_processes, int(process_id))
  config = contrastive.Config(devices=8, **json.loads(settings))
  task = contrastive.open_task(contrastive.resolve(config))
  read, opened = [], task.dataset

  class Counting:
    """The images, and how many of them this process read."""

    shape = opened.images.shape

    def __getitem__(self, index):
      read.append(len(index))
      return opened.images[index]

  dataset = dataclasses.replace(opened, images=Counting())
  task = task._replace(dataset=dataset)
  method = contrastive.make_method(task, config.method)
  folder = epath.Path(folder)
  state = contrastive.train(task, method, 0, folder / 'run')
  leaves = [np.asarray(x) for x in jax.tree.leaves(state.params)]
  if jax.process_index() == 0:
    np.savez(folder / 'params.npz', *leaves, read=np.sum(read))


if __name__ == '__main__':
  main(*sys.argv[1:])
