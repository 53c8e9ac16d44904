"""How many bytes a compiled program hands to its collectives."""

import re

import jax

_COLLECTIVES = r'(all-reduce|all-gather|reduce-scatter|collective-permute)'
_BITS = {'pred': 8, 'bf16': 16}


def operand_bytes(compiled: jax.stages.Compiled) -> int:
  """Adds up the operands of all collectives, as one device has them."""
  text = compiled.as_text()
  shapes = dict(re.findall(r'(%[\w.-]+) = (\w+\[[\d,]*\])', text))
  total = 0
  for arguments in re.findall(rf'\s{_COLLECTIVES}(?:-start)?\(([^)]*)\)', text):
    for name in re.findall(r'%[\w.-]+', arguments[1]):
      total += _bytes(shapes[name])
  return total


def _bytes(shape: str) -> int:
  dtype, sizes = re.fullmatch(r'(\w+)\[([\d,]*)\]', shape).groups()
  bits = _BITS.get(dtype) or int(re.search(r'\d+', dtype).group())
  count = 1
  for size in filter(None, sizes.split(',')):
    count *= int(size)
  return count * bits // 8
