"""The engine: whatever joins or leaves, each answer is the one that `generate` gives for it alone."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from made_adapters import adapted, save
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import multiflora
from multiflora.serve.engine import Engine
from multiflora.serve.job import Job
from multiflora.serve.limits import Limits
from multiflora.serve.mixed import Mixed
from multiflora.serve.models import load_served

KINDS = [("base", None), ("rlora", None), ("mtllora", 0), ("mtllora", 1), ("multilora", None), ("lora", None)]


class Words:
    """A tokenizer of which only decoding is asked."""

    @staticmethod
    def decode(ids, **_):
        return "".join(f" w{i}" for i in ids)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=256, **shape)).save_pretrained(folder / "base")

    def base():
        return AutoModelForCausalLM.from_pretrained(folder / "base")

    for name in ("rlora", "mtllora", "multilora"):
        save(adapted(name, base(), target_modules=["q_proj", "up_proj", "down_proj"]), folder / name)
    lora = get_peft_model(
        base(), LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    lora.save_pretrained(folder / "lora")
    prompt = get_peft_model(base(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    prompt.save_pretrained(folder / "prompt")
    names = ("rlora", "mtllora", "multilora", "lora", "prompt")
    return load_served(base().eval(), "base", {name: folder / name for name in names})


def answers(models, kinds, limits, *, count):
    """Random requests at random times; each job when it is finished."""
    draw = random.Random(0)

    async def all_of_them():
        engine, loop = Engine(models, [1], limits), asyncio.get_running_loop()
        work = asyncio.create_task(engine.run())

        async def one():
            name, task = draw.choice(kinds)
            prompt = [draw.randrange(2, 50) for _ in range(draw.randrange(1, 20))]
            length, turns = draw.randrange(1, 25), draw.randrange(200)
            for _ in range(turns):
                await asyncio.sleep(0)
            words = {"temperature": 0, "top_p": 1, "seed": 0, "stops": [], "tokenizer": Words, "ends": [1]}
            job = Job(model=name, prompt=prompt, max_tokens=length, task=task, loop=loop, **words)
            engine.submit([job])
            await job.whole()
            return job

        jobs = await asyncio.gather(*(one() for _ in range(count)))
        while engine.running:  # an answer is told before its row is let go of
            await asyncio.sleep(0)
        await engine.stop()
        work.cancel()
        return jobs

    return asyncio.run(all_of_them())


def alone(models, job):
    ids = torch.tensor([job.prompt])
    with multiflora.task(models[job.model].model, job.task or 0):
        words = {"max_new_tokens": job.max_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
        found = models[job.model].model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **words)
    return found[0, len(job.prompt) :].tolist()


@pytest.mark.parametrize("limits", [Limits(max_batch=12, chunk=4), Limits(max_cache=90, chunk=64)], ids=["many", "few"])
def test_sixty_requests_at_random_times_are_answered_as_each_alone(models, limits):
    jobs = answers(models, KINDS, limits, count=60)
    assert len({job.model for job in jobs}) == 5
    for job in jobs:
        assert job.decoder.ids == alone(models, job), (job.model, job.task)


def test_base_and_adapters_of_several_methods_share_one_batch(models):
    base = models["base"].model
    assert Mixed(base, models).names == {"base", "rlora", "mtllora", "multilora", "lora"}


def test_an_adapter_that_changes_more_than_layers_is_answered_beside_them(models):
    jobs = answers(models, [("prompt", None), ("rlora", None)], Limits(), count=6)
    assert {job.model for job in jobs} == {"prompt", "rlora"}
    for job in jobs:
        if job.model == "rlora":
            assert job.decoder.ids == alone(models, job)
        else:
            assert len(job.decoder.ids) == job.max_tokens or job.decoder.ids[-1] == 1
