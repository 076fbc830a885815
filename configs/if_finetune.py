r"""Fine-tuning of a DeepFloyd IF stage on a folder of images with captions.

  python train.py --config if_finetune --workdir runs/if/mine \
      --config.model=IF/IF-I-XL-v1.0 --config.data.path=DIR

`model` is a stage's folder as downloaded. The text encoder is read from there,
or from `text.path`, once: embeddings of all captions are kept in the workdir.

  method     'lora' trains low-rank adapters of the attentions, with the
             weights in the computation's type; 'full' trains everything, in
             float32: four numbers a parameter with Adam and the EMA.
  variance   'keep' continues training the three channels that say the step's
             variance, with λ L_vlb (`bound_weight`); 'drop' cuts them off and
             samples with the smaller variance, as diffusers' scripts do.

The result, `WORKDIR/export/STAGE`, is a stage's folder again: put it beside
the other stage (and the text encoder's) and give that folder to sample.py.

No result is printed here: it was run on tiny random networks only, for whose
real weights IF's licence asks.
"""

from ml_collections import ConfigDict


def get_config():
  """Adapters of rank 16, the variance kept."""
  return ConfigDict(
    {
      'kind': 'if_finetune',
      'seed': 0,
      'dtype': 'auto',
      'model': '',
      'method': 'lora',
      'rank': 16,
      'scale': 16.0,
      'variance': 'keep',
      'bound_weight': 0.001,
      'text': {'path': '', 'max_len': 77, 'dtype': 'bfloat16', 'clean': False},
      'data': {'kind': 'folder', 'path': '', 'eval_path': None, 'seed': 0},
      'train': {
        'num_steps': 1000,
        'batch_size': 8,
        'accumulate': 1,
        'log_every': 10,
        'checkpoint_every': 200,
        'checkpoint_dir': None,
        'sample_every': 200,
        'eval_every': 200,
        'keep_last': 2,
        'keep_every': None,
        'ema_decay': 0.99,
        'max_bad_steps': 10,
        'hang_seconds': 1800.0,
        'profile_at': None,
        'log_to': '',
        'optimizer': {
          'kind': 'adam',
          'learning_rate': 1e-4,
          'warmup': 50,
          'decay': False,
          'clip': 1.0,
          'options': {},
        },
      },
      'mesh': {'data': -1, 'fsdp': 1},
    }
  )
