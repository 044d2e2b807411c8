"""The fields of the sections data, scenario, memory, model, optim, meta and others.

Those of a run as a whole and those of its phases are in `config.fields`.
"""

from bsce_jax.config.declare import Field
from bsce_jax.models import heads

DATA = {
    "name": Field(
        "cifar100", "A tfds data set prepared as array_record, or digits.", base=True
    ),
    "data_dir": Field(
        "",
        "Folder of the data sets; '' = TFDS_DATA_DIR or ~/tensorflow_datasets.",
        hashed=False,
        longest=4000,
    ),
    "train_split": Field("train", "Split of the training images.", base=True),
    "test_split": Field("test", "Split of the test images.", base=True),
    "loading": Field(
        "resident",
        "resident: decoded once, kept on the devices; streaming: decoded as they are "
        "needed, by Grain.",
        choices=("resident", "streaming"),
        base=True,
    ),
    "image_size": Field(
        0,
        "resident: images are shrunk to this size once, 0 = as they are; streaming: "
        "side of the crops.",
        least=0,
        most=4096,
        base=True,
    ),
    "resize": Field(
        0,
        "streaming, evaluation: shorter side before the centre crop; 0 = none.",
        least=0,
        most=8192,
        base=True,
    ),
    "random_resized_crop": Field(
        True,
        "streaming, training: a random part of the image (Inception's), else as in "
        "evaluation.",
        base=True,
    ),
    "crop_area": Field(
        (0.08, 1.0), "That part's share of the image.", least=0, most=1, base=True
    ),
    "corrupt": Field(
        "refuse",
        "streaming, an image that is none: refuse ends the run; skip gives it weight "
        "0. A run that refuse has ended goes on with skip.",
        choices=("refuse", "skip"),
        hashed=False,
    ),
    "workers": Field(
        -1,
        "streaming: decoding processes of a host; 0 = threads of the run's process, "
        "-1 = automatic.",
        least=-1,
        most=1024,
        hashed=False,
    ),
    "timeout": Field(
        600.0,
        "streaming: seconds to wait for a batch; 0 = for ever.",
        least=0,
        most=1e6,
        hashed=False,
    ),
    "max_per_class": Field(
        0,
        "First training images of each class that are used; 0 = all.",
        least=0,
        base=True,
    ),
    "nominal_per_class": Field(
        500, "Images of a class, for an epsilon in percent.", least=1
    ),
    "validation_fraction": Field(
        0.0,
        "Fraction of the training images held out; where it is not 0 the accuracies "
        "are those on them, so that nothing is tuned on the test images.",
        least=0,
        most=0.9,
        base=True,
    ),
    "padding": Field(
        4,
        "Zero padding of the random crop, pixels; 0 = no crop.",
        least=0,
        most=1024,
        base=True,
    ),
    "flip": Field(True, "Random horizontal flip.", base=True),
    "brightness": Field(
        0.0, "Random brightness factor in [1 - b, 1 + b].", least=0, most=1, base=True
    ),
    "mean": Field(
        (0.5071, 0.4866, 0.4409),
        "Per channel, of pixels in [0, 1].",
        least=-1000,
        most=1000,
        base=True,
    ),
    "std": Field(
        (0.2009, 0.1984, 0.2023),
        "Per channel, as the mean.",
        least=1e-3,
        most=1000,
        base=True,
    ),
}

SCENARIO = {
    "subset": Field(
        "all",
        "Classes used; first100 and lucir are of ImageNet's 1000.",
        choices=("all", "first100", "lucir"),
    ),
    "class_order": Field(
        "seed1993",
        "seed<N> (NumPy shuffle), icarl, natural, or labels separated by commas.",
        longest=100_000,
    ),
    "base_classes": Field(
        50, "Classes of the base step; 0 = `steps` equal groups.", least=0, most=10**6
    ),
    "steps": Field(
        5,
        "Incremental steps after the base step (groups, without a base).",
        least=1,
        most=10**6,
    ),
}

MEMORY = {
    "kind": Field(
        "growing",
        "growing: per_class exemplars of each class; fixed: budget in all.",
        choices=("growing", "fixed", "none"),
    ),
    "per_class": Field(20, "growing: exemplars of a class.", least=0, most=10**6),
    "budget": Field(2000, "fixed: exemplars of all classes together.", least=0),
    "selection": Field(
        "herding",
        "How exemplars are chosen; herding_raw: on features of any length (BiC); "
        "first: the first images of each class (SS-IL).",
        choices=("herding", "herding_raw", "random", "first"),
    ),
    "held_out": Field(
        "anew",
        "The held-out images, of Meta's alpha or of a phase. anew: drawn in each step "
        "from its training set; once: of each class the same from the start, which "
        "nothing else ever learns from (BiC). They count as exemplars.",
        choices=("anew", "once"),
    ),
}

MODEL = {
    "name": Field(
        "resnet32",
        "resnet<6n+2> (CIFAR), resnet18, resnet34, podnet<6n+2>, podnet18. The "
        "last two are PODNet's, where shortcut, final_relu and stem are as published.",
        base=True,
    ),
    "width": Field(
        0,
        "Channels of the first stage; 0 = as published (16 or 64).",
        least=0,
        most=8192,
        base=True,
    ),
    "shortcut": Field(
        "B",
        "A (padding) or B (1x1 convolution), CIFAR networks.",
        choices=("A", "B"),
        base=True,
    ),
    "final_relu": Field(True, "ReLU after the last block's addition.", base=True),
    "stem": Field(
        "7x7",
        "First convolution of resnet18 and resnet34.",
        choices=("7x7", "3x3"),
        base=True,
    ),
    "head": Field(
        "linear",
        "The classifier; cosine is LUCIR's, local_similarity PODNet's.",
        choices=heads.NAMES,
        base=True,
    ),
    "proxies": Field(
        10, "local_similarity: proxies of a class.", least=1, most=1000, base=True
    ),
    "auxiliary": Field(
        0,
        "Outputs of an auxiliary branch on the last map, which only training uses "
        "(SPB-I's tells four rotations); 0 = none.",
        least=0,
        most=1000,
        base=True,
    ),
    "kernel_scales": Field(
        False,
        "Each kernel of a convolution has a factor, 1 at first, which trains in its "
        "place where rate.convolutions is 0 (Mnemonics).",
        base=True,
    ),
    "dtype": Field(
        "float32",
        "Type of the computation; parameters are float32.",
        choices=("float32", "bfloat16"),
        base=True,
    ),
    "conv_chunks": Field(
        0,
        "Batch chunks of a convolution (CPU speed); 0 = automatic.",
        least=0,
        most=1024,
        base=True,
    ),
}

OPTIM = {
    "batch_size": Field(
        128, "Images of all devices together.", least=1, most=2**17, base=True
    ),
    "momentum": Field(0.9, "Momentum of SGD.", least=0, most=1, base=True),
    "weight_decay": Field(
        2e-4,
        "Coupled (L2), on every parameter that trains.",
        least=0,
        most=1e3,
        base=True,
    ),
    "weight_decay_by_step": Field(
        "constant",
        "groups/step: the weight decay is multiplied by the number of all steps and "
        "divided by that of the step, counted from 1 (BiC on ImageNet).",
        choices=("constant", "groups/step"),
        base=True,
    ),
    "decayed": Field(
        "all",
        "What decays: all parameters of the network, or its kernels (iCaRL), which are "
        "neither biases nor BatchNorm's; what a method trains besides never does.",
        choices=("all", "kernels"),
        base=True,
    ),
    "noise": Field(
        0.0,
        "Noise on the gradient (EEIL): in epoch e, counted from 1, its standard "
        "deviation is noise / (1 + e)^0.55 over the images of a batch; 0 = none.",
        least=0,
        most=1e6,
        base=True,
    ),
    "noise_epochs": Field(
        1,
        "Passes that count as one epoch of the noise; each stands for `short` of them.",
        least=1,
        most=100_000,
        base=True,
    ),
    "clip": Field(
        0.0,
        "Every entry of the gradient is kept in [-clip, clip]; 0 = no limit.",
        least=0,
        base=True,
    ),
}

META = {
    "every": Field(
        10, "Updates from one update of alpha to the next.", least=1, most=1000
    ),
    "fraction": Field(
        0.1,
        "Of a class's exemplars, held out in B_t (at least one).",
        least=0,
        most=0.5,
    ),
    "batch_size": Field(128, "Images of a batch of B_t.", least=1, most=2**17),
    "inner_learning_rate": Field(
        0.0, "One-step inner SGD; 0 = the current learning rate.", least=0, most=1e4
    ),
    "optimizer": Field("sgd", "Optimiser of alpha.", choices=("sgd", "adam")),
    "learning_rate": Field(1.0, "Of alpha.", least=0, most=1e6),
    "variable": Field(
        "alpha",
        "What that optimiser moves; with log_alpha its steps are factors.",
        choices=("alpha", "log_alpha"),
    ),
    "minimum": Field(
        1e-3, "alpha stays in [minimum, maximum].", least=1e-12, most=1e12
    ),
    "maximum": Field(10.0, "See minimum.", least=1e-12, most=1e12),
    "batch_norm": Field(
        "train", "Statistics of the pass over B_t.", choices=("train", "eval")
    ),
}

EVALUATION = {
    "batch_size": Field(
        500, "Images a call, in evaluation and herding.", least=1, most=2**17
    ),
    "nearest_mean": Field(
        True, "With a memory, also the accuracy of the nearest mean of exemplars."
    ),
}

CHECKPOINT = {
    "minutes": Field(
        10.0,
        "From one checkpoint to the next inside a step; the end of a step always "
        "saves.",
        least=0,
        most=1e6,
        hashed=False,
    ),
    "keep": Field(
        2,
        "Newest checkpoints kept besides the ends of steps.",
        least=1,
        hashed=False,
    ),
}
