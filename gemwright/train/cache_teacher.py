"""cache-teacher: what a teacher says of a data set, stored for `gemwright distill --teacher_cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemwright.data.loader import Batching, Loader
from gemwright.data.store import tokenizer_digest
from gemwright.hub import resolve
from gemwright.tokenizer import Tokenizer
from gemwright.train.distill import speaking
from gemwright.train.distill_options import CacheTeacherConfig
from gemwright.train.distributed import World
from gemwright.train.drawn import Sampling
from gemwright.train.sft import documents
from gemwright.train.teacher_cache import key_of, make, save_head


def cache_teacher(config: CacheTeacherConfig) -> dict[str, Any]:
    """Make the caches of the training data and, where there is any, of the evaluation's; a summary of each."""
    assert config.teacher is not None
    out = Path(config.output).expanduser()
    sampling = None
    if config.samples is not None:
        sampling = Sampling(draws=config.samples, temperature=config.temperature, seed=config.seed)
    with World.join(config.device) as world:
        folder = resolve(config.teacher, offline=config.offline)
        tokenizer = Tokenizer.load(folder if config.tokenizer is None else resolve(config.tokenizer))
        cache = Path(config.token_cache).expanduser() if config.token_cache else out / "tokens"
        sets = {"train": (config.dataset_name, config.dataset_train_split)}
        if config.eval_name is not None:
            sets["eval"] = config.eval_name, config.dataset_test_split
        batching = Batching(
            length=config.max_seq_length, rows=config.batch_size, shuffle=False, overlong=config.overlong
        )
        loaders = {
            part: Loader(documents(config, name, split, tokenizer, world, cache=cache), batching)
            for part, (name, split) in sets.items()
        }
        teacher = speaking(folder, config, tokenizer, None, world)
        done = {}
        for part, loader in loaders.items():
            key = key_of(loader, teacher, tokenizer_digest(tokenizer), sampling)
            report = make(
                out / part, loader, teacher, key, sampling=sampling, rows=config.batch_size, rank=world.rank,
                world=world.size,
            )  # fmt: skip
            done[part] = report.summary()
        if world.leads:
            save_head(out, teacher.head)
        world.wait()
    return done
