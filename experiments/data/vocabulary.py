"""Texts to bags of words; what to leave out so that topics show."""

from collections.abc import Collection, Sequence

import numpy as np
from sklearn.feature_extraction import text as sklearn_text

from emc2.experiments.data import corpus, docstrings

# The headings of a docstring and what stands below each of them: types, names
# of Python and its packages, Sphinx roles, TeX, and verbs that say no more than
# that something is done. Found as what is frequent in every package.
_DOCSTRING = """
arg args argument arguments attribute attributes default defaults doc docs
docstring documentation example examples keyword kwargs note notes param
parameter parameters params raise raised raises reference references return
returned returning returns see usage warn warning warnings yield yields

any array arrays bool boolean callable char dict dictionary dtype dtypes false
float floats int integer integers ints iterable list lists ndarray ndarrays none
null object objects scalar scalars sequence sequences str string strings true
tuple tuples type types

abs append arange assert astype attr base class classes cls code datasets def
fig func function functions import instance instances len linspace metadata
method methods module modules names np obj ones package print property python
randomstate range repr reshape rng seed self shape shapes size subclass
subclasses super valueerror variable variables version zeros

flax jax jnp lax linalg matplotlib mpl nnx numpy optax plt pyplot scipy sklearn
stats subplots

added api auto changed deprecated deprecation doi exc experimental future
glossary guide html http https meth mod new org ref release removed section
seealso term user versionadded versionchanged versiondeprecated wiki wikipedia
www

begin cdot cdots dots end exp frac geq infty ldots left leq math mathbb mathbf
mathcal mathrm operatorname qquad quad right sqrt text textrm

able above accept accepted accepts according actual additional allow allowed
allows along applied applies apply appropriate assume assumed automatically
available avoid based behavior behaviour below best calculate calculated call
called calling calls case cases change check chosen common compatible
computation computations compute computed computes computing consider considered
consists construct contain contained containing contains context control
convenience convert converted copy correct correspond corresponding corresponds
create created creates creating current currently define defined defines
depending depends described description desired detail detailed details
determine determined determines different directly does doing effect either
element elements ensure entry equal equivalent error errors even exactly exist
existing exists expected extra final follow following follows form format
general generally generate generated get gets give given gives greater handle
having ignored implement implementation implemented implements important include
included includes including indicate indicates indicating individual info
information initial inplace input inputs inside instead internal internally item
items just keep known large larger length let level like likely line main make
makes making may mean means mode modified multiple must name necessary need
needed needs non number numbers obtain obtained one operation operations option
optional optionally options order original otherwise output outputs override
particular pass passed passing perform performed performs place possible present
produce provide provided provides purpose random read refer relative represent
representation represented representing represents require required requires res
respect respective respectively result resulting results role run running said
second seen set sets setting settings shown similar simple simply single small
smaller special specific specified specifies specify specifying standard start
stored subset sum support supported supports take taken takes target thing time
times total treated try turn two typically unless unlike use used useful uses
using usually valid value values want way work works zero
"""

DOCSTRING_STOP_WORDS = frozenset(_DOCSTRING.split())
"""Words of any docstring, lower case, that tell no subject from another."""

STOP_WORDS = sklearn_text.ENGLISH_STOP_WORDS | DOCSTRING_STOP_WORDS
"""English function words and those of any docstring."""

_WORD = r'(?<!\w)[^\W\d_]{3,}(?!\w)'


def count(
  texts: Sequence[str],
  *,
  stop_words: Collection[str] = STOP_WORDS,
  min_documents: int = 5,
  max_share: float = 0.25,
  max_vocabulary: int | None = None,
  labels: np.ndarray | None = None,
  class_names: tuple[str, ...] = (),
) -> corpus.Corpus:
  """Counts the words of texts.

  A word is three or more letters, in lower case, that touch no digit and no
  underscore: `n_samples` and `x2` are identifiers, not words.

  Args:
    texts: The documents.
    stop_words: Words in lower case to leave out.
    min_documents: In how many documents a word must stand.
    max_share: The greatest share of the documents in which a word may stand,
      in (0, 1].
    max_vocabulary: If there are more words, as many of the most frequent; None
      keeps all.
    labels: As in `corpus.Corpus`.
    class_names: As in `corpus.Corpus`.

  Returns:
    As many documents as texts; one that has none of the words left is empty.
    Words are sorted.

  Raises:
    ValueError: If a setting is out of range or no word is left.

  Examples:
    >>> found = count(['A sphere of spheres.', 'The sphere'], min_documents=1,
    ...               max_share=1.0)
    >>> found.words, found.counts.toarray().tolist()
    (('sphere', 'spheres'), [[1, 1], [1, 0]])
  """
  for name, value in (
    ('min_documents', min_documents),
    ('max_vocabulary', 1 if max_vocabulary is None else max_vocabulary),
  ):
    if value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}.')
  if not 0 < max_share <= 1:
    raise ValueError(f'max_share must lie in (0, 1], got {max_share}.')
  vectorizer = sklearn_text.CountVectorizer(
    token_pattern=_WORD,
    stop_words=list(stop_words),
    min_df=min_documents,
    max_df=float(max_share),
    max_features=max_vocabulary,
    dtype=np.int32,
  )
  try:
    counts = vectorizer.fit_transform(texts)
  except ValueError as error:  # One of several, for the one reason.
    raise ValueError(
      f'texts: expected a word in at least {min_documents} and at most '
      f'{max_share:g} of all documents, got none in {len(texts)} documents.'
    ) from error
  words = tuple(vectorizer.get_feature_names_out().tolist())
  return corpus.make(counts, words, labels, class_names)


def count_docstrings(
  packages: Sequence[str] = docstrings.DEFAULT,
  *,
  label: str = 'package',
  max_documents: int | None = None,
  min_documents: int = 5,
  max_share: float = 0.25,
  max_vocabulary: int | None = None,
) -> corpus.Corpus:
  """Counts the words of the docstrings of installed packages: no download.

  Args:
    packages: As in `docstrings.load`.
    label: As in `docstrings.load`.
    max_documents: As in `docstrings.load`.
    min_documents: As in `count`.
    max_share: As in `count`.
    max_vocabulary: As in `count`.

  Returns:
    The documents, labelled by where they come from.

  Raises:
    ValueError: If a package is not installed or no word is left.
  """
  found = docstrings.load(packages, label=label, max_documents=max_documents)
  return count(
    found.texts,
    min_documents=min_documents,
    max_share=max_share,
    max_vocabulary=max_vocabulary,
    labels=found.labels,
    class_names=found.names,
  )
