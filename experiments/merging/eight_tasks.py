"""Eight image tasks, one small ViT: eleven ways to merge eight fine-tuned models into one.

A ViT is trained on upright clothes (the first half of Fashion-MNIST) and fine-tuned, with a head of
its own for each task, on clothes that are turned, upside down, negative, or cut in pieces (the
second half), on digits, and on fragments of files. Each model alone reaches 90% and more. The
bodies are merged, the heads are kept, as in the merging of CLIP models on eight tasks (Ilharco et
al. 2023, arXiv 2212.04089). `docs/merging.md` has the table, with a reading. Thirteen minutes or so
on two idle cores; `:tiny` is the same with few steps, two minutes or three that go into compiling,
and shows nothing but that it runs.

    lamina run --config=merging/eight_tasks --workdir=runs/eight_tasks
    lamina run --config=merging/eight_tasks:tiny --workdir=runs/eight_tiny
"""

from ml_collections import ConfigDict

SIZES = ("full", "tiny")

CLOTHES = (0, 1, 2, 3, 5, 7, 8, 9)
"""Without coats and shirts, which even good models take for other tops."""


def get_config(size: str = "full") -> ConfigDict:
    """Returns the config.

    Args:
        size: "full", or "tiny": few steps and examples, of two seeds.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: one of {', '.join(SIZES)}")
    tiny = size == "tiny"
    config = ConfigDict()
    config.program = "merge"
    config.seeds = (0, 1) if tiny else (0, 1, 2)  # values, of the fine-tunings; one base for all
    config.steps = 20 if tiny else 1500
    config.data = ConfigDict(dict(name="derived", part="first", batch_size=128, held_out=2000))
    config.model = ConfigDict(
        dict(name="vit", patch=7, depth=4, embed=64, heads=4, mlp=128, pool="gap")
    )
    config.task = ConfigDict(dict(name="classification"))
    config.optimizer = ConfigDict(dict(name="adamw", learning_rate=2e-3, weight_decay=1e-2))
    config.schedule = ConfigDict(dict(name="cosine", warmup_steps=10 if tiny else 100))
    config.evaluation = ConfigDict(dict(batch_size=200))
    config.log_every = config.steps_per_call = 10 if tiny else 100  # steps
    config.checkpoint = ConfigDict(dict(keep=1))
    config.trackers = ()

    few = 250 if tiny else 2000  # examples of validation, and of test

    # The seeds differ in the order of their examples: heads start at zero, bodies at the base.
    common = dict(batch_size=64, held_out=few, order="per_seed")

    def clothes(**changes) -> dict:
        data = dict(name="derived", part="second", classes=CLOTHES, **changes)
        return dict(data=dict(data, **common))

    def others(source: str, **changes) -> dict:
        data = dict(name="derived", source=source, **changes)
        return dict(data=dict(data, **common))

    scales = tuple(round(0.1 * number, 1) for number in range(1, 11))
    wide = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
    config.merge = ConfigDict(
        dict(
            finetune=dict(
                steps=20 if tiny else 600,
                optimizer=dict(learning_rate=1e-3),
                schedule=dict(warmup_steps=10 if tiny else 50),
                init_from_rules=dict(exclude=("^head/",)),
            ),
            own=("^head/",),
            tasks=dict(
                turned=clothes(rotation=1),
                upside_down=clothes(rotation=2),
                negative=clothes(invert=True),
                pieces=clothes(shuffle=1),
                negative_pieces=clothes(shuffle=2, invert=True),
                digits=others("digits"),
                negative_turned_digits=others("digits", invert=True, rotation=1),
                fragments=others("python_fragments"),
            ),
            methods=dict(
                average=dict(name="linear"),
                task_arithmetic=dict(name="task_arithmetic", scale=scales),
                ties=dict(name="ties", density=0.2, scale=wide),
                dare=dict(name="dare", density=0.5, scale=scales),
                model_stock=dict(name="model_stock"),
                fisher=dict(name="fisher"),
                regmean=dict(name="regmean"),
                iso_c=dict(name="iso_c", scale=wide),
                adamerging_task=dict(name="adamerging", coefficients="task"),
                adamerging_layer=dict(name="adamerging", coefficients="layer"),
                # What such coefficients reach with labels: how much of AdaMerging is its objective.
                supervised_layer=dict(name="adamerging", objective="labels"),
            ),
            examples=64 if tiny else 256,  # of each task, for Fishers and Gram matrices
            unlabeled="validation",  # whose inputs AdaMerging sees; the table is of test
            steps=10 if tiny else 500,  # of AdaMerging
        )
    )
    return config
