r"""Fine-tuning of a DeepFloyd IF stage on a folder of images with captions.

  python train.py --config if_finetune --workdir runs/if/mine \
      --config.model=IF/IF-I-XL-v1.0 --config.data.path=DIR

Embeddings of all captions are computed once and kept in the workdir.

  method     'lora' trains low-rank adapters of the attentions and keeps the
             weights in the computation dtype. 'full' trains all parameters in
             float32: with Adam and the EMA, four numbers per parameter.
  variance   'keep' continues to train the three channels that predict the
             step's variance, with λ L_vlb (`bound_weight`). 'drop' removes them
             and samples with the smaller variance, as diffusers' scripts do.

The output, `WORKDIR/export/STAGE`, is a stage's folder. Put it beside the other
stages and the text encoder, and give the folder that holds them to sample.py.

No result: the weights need IF's licence, so this was run with tiny random
networks only.
"""

from imagen_jax.configs import common


def get_config():
  """LoRA of rank 16, with the variance kept."""
  config = common.base()
  config.kind = 'if_finetune'
  config.model = ''  # the folder of a stage, as downloaded
  config.method = 'lora'  # or 'full'
  config.rank = 16  # of the adapters
  config.scale = 16.0  # the adapters' product is multiplied by scale / rank
  config.variance = 'keep'  # or 'drop'
  config.bound_weight = 0.001  # λ of L_vlb, for 'keep'
  # IF was trained on 77 tokens. An empty path: the text encoder of `model`.
  config.text.update(path='', max_len=77, dtype='bfloat16')
  config.text.clean = False  # clean captions as IF's own pipeline does
  # A short run with frequent evaluation, at a constant rate.
  config.train.update(num_steps=1000, batch_size=8, ema_decay=0.99)
  config.train.update(log_every=10, checkpoint_every=200, sample_every=200)
  config.train.update(eval_every=200, max_bad_steps=10)
  config.train.optimizer.update(warmup=50, decay=False)
  return config
