"""Lists of prompts in the file formats of common benchmarks."""

import pytest

from imagen_jax.errors import DataError, UsageError
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.prompts import read_prompts
from imagen_jax.evaluation.prompts_suite import Prompts

FILES = {
  'bench.csv': '\ufeffPrompt,Category\n"A cat, asleep.",Colors \n'
  'A "red" dog,Colors\n,Colors\nTwo birds,Counting\n',
  'parti.tsv': 'Prompt\tCategory\tChallenge\tNote\n'
  '"hi" on a sign\tText\tBasic\t-\nbond\tAbstract\tBasic\t-\n',
  'gen.jsonl': '{"tag": "two_object", "prompt": "a cat and a dog"}\n\n'
  '{"category": "mine", "prompt": "a cat"}\n{"prompt": "a fish"}\n',
  'mine.txt': 'a cat\n\n  two   dogs\n',
  'windows.txt': '\ufeffa cat\r\ntwo dogs\r\n',
  'lines.jsonl': '\ufeff{"prompt": "a\u2028cat"}\n{"prompt": "a\x85dog"}\n',
  'lines.tsv': 'Prompt\tCategory\na\x85cat\tmine\n',
  'lines.txt': 'a\u2028cat\ntwo\x0bdogs\n',
}
READ = {
  'bench.csv': [
    ('Colors', 'A cat, asleep.'),
    ('Colors', 'A "red" dog'),
    ('Counting', 'Two birds'),
  ],
  'parti.tsv': [('Text', '"hi" on a sign'), ('Abstract', 'bond')],
  'gen.jsonl': [
    ('two_object', 'a cat and a dog'),
    ('mine', 'a cat'),
    ('all', 'a fish'),
  ],
  'mine.txt': [('all', 'a cat'), ('all', 'two dogs')],
  'windows.txt': [('all', 'a cat'), ('all', 'two dogs')],
  'lines.jsonl': [('all', 'a cat'), ('all', 'a dog')],
  'lines.tsv': [('mine', 'a cat')],
  'lines.txt': [('all', 'a cat'), ('all', 'two dogs')],
}


@pytest.mark.parametrize('name', FILES)
def test_prompt_files_of_all_formats_are_read(name, tmp_path):
  path = tmp_path / name
  path.write_text(FILES[name], encoding='utf-8')
  assert read_prompts(path) == READ[name]


@pytest.mark.parametrize(
  'name, text',
  [
    ('no_prompt_column.csv', 'Text,Category\nx,y\n'),
    ('no_quotes.csv', 'Prompt\nA cat, asleep\n'),
    ('no_prompt.jsonl', '{"prompt": "a"}\n{"tag": "b"}\n'),
    ('no_object.jsonl', '[1]\n'),
    ('empty.txt', '\n'),
    ('surrogate.jsonl', '{"prompt": "\\ud800"}'),
    ('huge_field.csv', 'Prompt\n' + 'x' * 200_000),
    ('other_format.pkl', 'x'),
    ('missing.txt', None),
  ],
)
def test_a_broken_prompt_file_is_a_data_error(name, text, tmp_path):
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(DataError):
    read_prompts(tmp_path / name)


def test_a_repeated_prompt_gets_another_image():
  listed = (('a', 'x'), ('b', 'y'), ('a', 'x'))
  items = Prompts(listed, 2).items()
  assert [(i.category, i.number, i.prompt, i.index) for i in items] == [
    ('a', 0, 'x', 0),
    ('a', 1, 'x', 1),
    ('b', 0, 'y', 0),
    ('b', 1, 'y', 1),
    ('a', 2, 'x', 2),
    ('a', 3, 'x', 3),
  ]


def test_num_and_categories_choose_prompts(tmp_path):
  path = tmp_path / 'p.csv'
  path.write_text(FILES['bench.csv'])
  config = EvalConfig(prompts=path, num=1, categories=('Counting', 'Colors'))
  assert Prompts.from_config(config, 8).listed == (
    ('Colors', 'A cat, asleep.'),
    ('Counting', 'Two birds'),
  )
  with pytest.raises(UsageError) as error:
    Prompts.from_config(EvalConfig(prompts=path, categories=('Pears',)), 8)
  assert error.value.key == 'categories'
