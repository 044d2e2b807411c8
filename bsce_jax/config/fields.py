"""Every field of a run's configuration, with its default and what it means.

A configuration file starts from `default_config()` and changes fields; the command
line changes them again (`--config.optim.epochs=10`). `config.resolve` resolves and
validates the outcome.
"""

from ml_collections import ConfigDict


def default_config() -> ConfigDict:
    """Returns every field at its default: CIFAR-100, IL-Baseline, softmax (CE)."""
    c = ConfigDict()
    c.name = ""  # label in reports; "" = data set, method, prior and steps
    c.seed = 0  # initialisation, data order, augmentation and random selections
    c.method = "il_baseline"  # its procedure in bsce_jax/methods; losses: `terms`
    # Log-prior added to the logits in training (Jodelet et al., Eq. 3, 5 and 6):
    # none (softmax) | balanced | weighted (fixed alpha) | meta | relaxed
    c.prior = "none"
    c.alpha = 1.0  # weighted: factor of the old classes' counts (Eq. 5)
    c.epsilon = 0.0  # relaxed: weight of every old class (Eq. 6)
    c.epsilon_unit = "count"  # count | percent of data.nominal_per_class
    # auto: the method's own classification loss, whose place softmax_ce takes where
    # there is a prior | softmax_ce | separated_softmax_ce (without a prior)
    c.classification = "auto"
    # Images of an incremental step with exemplars: uniform (each once an epoch) |
    # memory (as many old as new ones, drawn with replacement) | class (as many of
    # every class); log-priors count the training set whatever is drawn from it.
    c.sampling = "uniform"
    c.init_from = ""  # workdir of another run whose base step is taken over
    c.parallel = "jit"  # jit (over a mesh of all devices) | pmap
    # updates in one compiled call; 0 = 1 on CPU and with streamed images, else 50
    c.updates_per_call = 0
    c.matmul_precision = "default"  # default | high | highest (float32 on GPU: TF32)
    c.deterministic = False  # GPU: only reproducible kernels (slower)
    c.print_plan = False  # print what would run, per step, and stop
    c.log_seconds = 10.0  # interval of log lines where there is no terminal
    c.compile_cache = True  # keep compiled programs in the workdir
    c.data = _data()
    c.scenario = _scenario()
    c.memory = _memory()
    c.model = _model()
    c.optim = _optim()
    c.finetune = _finetune()
    # Loss terms: name of a module in bsce_jax/losses -> weight, factor and options. A
    # weight is a number or one of terms.WEIGHTS ("rho" = old classes / seen
    # classes); `factor` (1 where it is not given) multiplies it.
    c.terms = ConfigDict()
    c.meta = _meta()
    c.evaluation = ConfigDict()
    c.evaluation.batch_size = 500  # images a call, in evaluation and herding
    # With a memory, also the accuracy of the nearest mean of exemplars (iCaRL).
    c.evaluation.nearest_mean = True
    c.checkpoint = ConfigDict()
    c.checkpoint.minutes = 10.0  # inside a step; the end of a step always saves
    c.checkpoint.keep = 2  # newest checkpoints kept besides the ends of steps
    return c


def _data() -> ConfigDict:
    c = ConfigDict()
    c.name = "cifar100"  # a tfds data set prepared as array_record, or "digits"
    c.data_dir = ""  # "" = TFDS_DATA_DIR or ~/tensorflow_datasets
    c.train_split = "train"
    c.test_split = "test"
    # resident (decoded once, kept on the devices) | streaming (decoded as they are
    # needed, by Grain)
    c.loading = "resident"
    # resident: images are shrunk to this size once, 0 = as they are; streaming: side of
    # the crops
    c.image_size = 0
    c.resize = 0  # streaming, evaluation: shorter side before the centre crop; 0 = none
    # streaming, training: a random part of the image (Inception's), else as evaluation
    c.random_resized_crop = True
    c.crop_area = (0.08, 1.0)  # that part's share of the image
    c.corrupt = "refuse"  # streaming, image that is none: refuse | skip (weight 0)
    # streaming: decoding processes of a host; 0 = threads of its one, -1 = automatic
    c.workers = -1
    c.timeout = 600.0  # streaming: seconds to wait for a batch; 0 = for ever
    c.max_per_class = 0  # first training images of each class; 0 = all
    c.nominal_per_class = 500  # for epsilon in percent
    # Fraction of the training images held out; where it is not 0 the accuracies are
    # those on the held-out images, so that nothing is tuned on the test images.
    c.validation_fraction = 0.0
    c.padding = 4  # zero padding of the random crop, pixels; 0 = no crop
    c.flip = True  # random horizontal flip
    c.brightness = 0.0  # random brightness factor in [1 - b, 1 + b]
    c.mean = (0.5071, 0.4866, 0.4409)  # per channel, of pixels in [0, 1]
    c.std = (0.2009, 0.1984, 0.2023)
    return c


def _scenario() -> ConfigDict:
    c = ConfigDict()
    c.subset = "all"  # classes used: all | first100 | lucir (of ImageNet's 1000)
    # seed<N> (NumPy shuffle) | icarl | natural | labels separated by commas
    c.class_order = "seed1993"
    c.base_classes = 50  # classes of the base step; 0 = `steps` equal groups
    c.steps = 5  # incremental steps after the base step (groups, without a base)
    return c


def _memory() -> ConfigDict:
    c = ConfigDict()
    c.kind = "growing"  # growing (per_class each) | fixed (budget in all) | none
    c.per_class = 20  # growing: exemplars of a class
    c.budget = 2000  # fixed: exemplars of all classes together
    c.selection = "herding"  # herding | random
    return c


def _model() -> ConfigDict:
    c = ConfigDict()
    # resnet<6n+2> (CIFAR) | resnet18 | resnet34 | podnet<6n+2> | podnet18: the last
    # two are PODNet's, where shortcut, final_relu and stem are as published
    c.name = "resnet32"
    c.width = 0  # channels of the first stage; 0 = as published (16 or 64)
    c.shortcut = "B"  # A (padding) | B (1x1 convolution), CIFAR networks
    c.final_relu = True  # ReLU after the last block's addition
    c.stem = "7x7"  # 7x7 | 3x3, resnet18 and resnet34
    c.head = "linear"  # linear | cosine (LUCIR) | local_similarity (PODNet)
    c.proxies = 10  # of a class, local_similarity
    c.dtype = "float32"  # float32 | bfloat16 compute; parameters are float32
    c.conv_chunks = 0  # batch chunks of a convolution (CPU speed); 0 = automatic
    return c


def _optim() -> ConfigDict:
    c = ConfigDict()
    c.epochs = 250
    c.batch_size = 128  # images of all devices together
    c.learning_rate = 0.1
    c.momentum = 0.9
    c.weight_decay = 2e-4  # coupled (L2), on every parameter
    # step (milestones) | cosine (to 0, one epoch behind, as PODNet's authors run it)
    c.schedule = "step"
    c.milestones = (100, 150, 200)  # epochs at which the rate is multiplied by decay
    c.decay = 0.1
    c.clip = 0.0  # every entry of the gradient is kept in [-clip, clip]; 0 = no limit
    c.freeze_old_rows = False  # the old classes' rows of the head do not move
    # The base step, where it differs: 0 epochs = epochs and milestones as above, rate
    # 0 = as above.
    c.base_epochs = 0
    c.base_learning_rate = 0.0
    c.base_milestones = ()
    return c


def _finetune() -> ConfigDict:
    """Balanced fine-tuning on the exemplars of all classes, after a step's training."""
    c = ConfigDict()
    # auto: where prior is none (a balanced loss takes its place) | always | never
    c.when = "auto"
    c.epochs = 0  # 0 = the method has no fine-tuning
    c.learning_rate = 0.01
    c.milestones = ()  # epochs at which the rate is multiplied by optim.decay
    c.trainable = "head"  # head (all rows, but not the learned scale) | all
    c.batch_norm = "eval"  # train: batch statistics, running ones go on | eval
    return c


def _meta() -> ConfigDict:
    c = ConfigDict()
    c.every = 10  # updates from one update of alpha to the next
    c.fraction = 0.1  # of a class's exemplars held out in B_t (at least one)
    c.batch_size = 128  # images of a batch of B_t
    c.inner_learning_rate = 0.0  # one-step inner SGD; 0 = the current learning rate
    c.optimizer = "sgd"  # of alpha: sgd | adam
    c.learning_rate = 1.0  # of alpha
    # What that optimiser moves: alpha | log_alpha (its steps are then factors)
    c.variable = "alpha"
    c.minimum = 1e-3  # alpha stays in [minimum, maximum]
    c.maximum = 10.0
    c.batch_norm = "train"  # statistics of the pass over B_t: train | eval
    return c
