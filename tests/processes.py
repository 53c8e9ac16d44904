"""Starts a module of the tests as several processes of one run."""

import socket
import subprocess
import sys


def run(module: str, num_processes: int, *arguments: str, timeout=240) -> None:
  """Runs `python -m module coordinator num_processes id ...`, all at once.

  Raises:
    RuntimeError: If a process fails; with the end of what it wrote.
  """
  with socket.socket() as free:
    free.bind(('localhost', 0))
    coordinator = f'localhost:{free.getsockname()[1]}'
  processes = [
    subprocess.Popen(
      [
        sys.executable,
        '-m',
        module,
        coordinator,
        str(num_processes),
        str(number),
        *arguments,
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for number in range(num_processes)
  ]
  try:
    for number, process in enumerate(processes):
      output, _ = process.communicate(timeout=timeout)
      if process.returncode:
        raise RuntimeError(
          f'process {number} of {module} ended with {process.returncode}: '
          f'{output[-3000:]}'
        )
  finally:
    for process in processes:
      process.kill()
      process.communicate()
