r"""A 64×64 base model of your own images, each with a caption beside it.

  python train.py --config folder64 --workdir runs/mine/base \
      --config.data.path=DIR

DIR holds images with `.txt` captions of the same name, or a
`metadata.jsonl`. Tars are read with `--config.data.kind=webdataset
--config.data.path='shards/*.tar'`, what imagen-prepare wrote with
`--config.data.kind=arrayrecord`. The text encoder is the demo's, which is
enough for a trial; for real captions point `text.path` at a folder of T5 v1.1
weights in Hugging Face layout (config.json, safetensors, spiece.model).
`data.eval_path` is a second set, of the same kind, that is never trained on:
the held-out loss is its.
"""

from imagen_jax.configs import shapes_base


def get_config():
  """One base stage at the paper's resolution, a small width."""
  config = shapes_base.get_config()
  config.stage.resolution = 64
  config.stage.net.update(
    channels=64,
    channel_mults=(1, 2, 3, 4),
    num_res_blocks=(2, 2, 2, 2),
    attention_resolutions=(16, 8),
    emb_channels=256,
    head_dim=64,
    norm_groups=32,
  )
  config.text.update(path='demo', max_len=64)
  config.data = {
    'kind': 'folder',
    'path': '',
    'eval_path': None,
    'seed': 0,
    'resize': 'area',
    'flip': False,
    'max_bad': 0.01,
  }
  config.train.update(num_steps=20_000, batch_size=32)
  config.train.optimizer.update(kind='adam', learning_rate=3e-4)
  config.train.optimizer.options = {'b1': 0.9, 'b2': 0.99}
  return config
