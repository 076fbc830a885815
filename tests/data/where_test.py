"""Conditions that images must meet."""

import numpy as np
import pytest

from imagen_jax.data import where
from imagen_jax.errors import UsageError


@pytest.mark.parametrize(
  'text, expected',
  [
    ('x<2', [1, 0, 0, 0]), ('x <= 2', [1, 1, 0, 0]), ('x>2', [0, 0, 1, 0]),
    ('x>=2', [0, 1, 1, 0]), ('x==2', [0, 1, 0, 0]), ('x!=2', [1, 0, 1, 0]),
  ],
)  # fmt: skip
@pytest.mark.parametrize('missing', [None, np.nan, '', 'n/a'])
def test_numbers_compare_and_a_missing_one_never_passes(
  text, expected, missing
):
  (condition,) = where.parse([text])
  for values in [1, 2, 3, missing], ['1', '2.0', '3e0', missing]:
    assert condition.holds(values).tolist() == [*map(bool, expected)]


def test_words_are_equal_or_not_and_a_missing_one_never_passes():
  values = ['UNLIKELY', 'NSFW', None, '']
  same, other = where.parse(['nsfw==unlikely', 'nsfw != unlikely'])
  assert same.holds(values).tolist() == [True, False, False, False]
  assert other.holds(values).tolist() == [False, True, False, False]
  assert where.parse(['safe==true'])[0].holds([True, False]).tolist() == [
    True, False
  ]  # fmt: skip


@pytest.mark.parametrize('value', ['"Not safe"', "'not safe'", 'NOT SAFE'])
def test_quotes_around_a_word_are_no_part_of_it(value):
  (condition,) = where.parse([f'nsfw == {value}'])
  assert condition.holds(['not safe', '"not safe"']).tolist() == [True, False]


@pytest.mark.parametrize(
  'text', ['', 'side', 'side>', '>3', 'side=3', 'a b>3', 'nsfw<unlikely', 3]
)
def test_what_is_no_condition_is_refused(text):
  with pytest.raises(UsageError) as error:
    where.parse([text])
  assert error.value.key == 'config.data.where'


def test_an_unknown_column_is_refused_naming_those_there_are():
  conditions = where.parse(['similarity>0.3', 'side>3'])
  where.check_columns(conditions, ['similarity'], 'here')
  with pytest.raises(UsageError, match='similarity.*caption_words, other'):
    where.check_columns(conditions, ['other'], 'here')


def test_the_first_condition_that_fails_is_the_reason():
  conditions = where.parse(['side>=3', 'aspect<=2'])
  columns = where.image_columns(np.array([[3, 9], [2, 9], [9, 3], [4, 5]]))
  found = where.first_failure(conditions, columns, 4)
  assert found.tolist() == [1, 0, 1, -1]
