"""The engine: whatever joins or leaves, each answer is the one that `generate` gives for it alone."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from made_adapters import adapted, save
from mixtures import PRODUCTS, mixture
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import multiflora
from multiflora.methods import inference
from multiflora.methods.inference import Store
from multiflora.serve.engine import Engine, _Lane
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
            prompt = [draw.randrange(2, 50) for _ in range(draw.randrange(1, 12))]
            length, turns = draw.randrange(1, 9), draw.randrange(200)
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


@pytest.fixture(scope="module")
def right(models):
    """What `generate` answers to a job alone; asked once where two tests have the same job."""
    known = {}

    def answer(job):
        key = (job.model, job.task, tuple(job.prompt), job.max_tokens)
        if key not in known:
            known[key] = alone(models, job)
        return known[key]

    return answer


def alone(models, job):
    ids = torch.tensor([job.prompt])
    with multiflora.task(models[job.model].model, job.task or 0):
        words = {"max_new_tokens": job.max_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
        found = models[job.model].model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **words)
    return found[0, len(job.prompt) :].tolist()


@pytest.mark.parametrize("limits", [Limits(max_batch=12, chunk=4), Limits(max_cache=60, chunk=64)], ids=["many", "few"])
def test_sixty_requests_at_random_times_are_answered_as_each_alone(models, right, limits):
    jobs = answers(models, KINDS, limits, count=60)
    assert len({job.model for job in jobs}) == 5
    for job in jobs:
        assert job.decoder.ids == right(job), (job.model, job.task)


def test_adapters_on_a_mixture_s_experts_are_answered_as_each_alone(tmp_path):
    mixture("mixtral").save_pretrained(tmp_path / "base")

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

    for name in ("rlora", "mtllora"):
        words = {"target_modules": ["q_proj"], "target_parameters": PRODUCTS["mixtral"]}
        save(adapted(name, base(), **words), tmp_path / name)
    models = load_served(base(), "base", {name: tmp_path / name for name in ("rlora", "mtllora")})
    kinds = [("base", None), ("rlora", None), ("mtllora", 0), ("mtllora", 1)]
    jobs = answers(models, kinds, Limits(max_batch=8, chunk=4), count=24)
    assert len({job.model for job in jobs}) == 3
    for job in jobs:
        assert job.decoder.ids == alone(models, job), (job.model, job.task)


def job_of(model, prompt, length, task=None):
    words = {"temperature": 0, "top_p": 1, "seed": 0, "stops": [], "tokenizer": Words, "ends": [1]}
    loop = asyncio.new_event_loop()
    loop.close()  # nobody reads
    return Job(model=model, prompt=prompt, max_tokens=length, task=task, loop=loop, **words)


def lane_of(models):
    """A lane for the base model and all adapters, and the size of each of its passes."""
    mixed, sizes = Mixed(models["base"].model, models), []

    def forward(ids, *args, **words):
        sizes.append(tuple(ids.shape))
        return mixed.forward(ids, *args, **words)

    return _Lane(models["base"].model, forward), sizes


def test_short_prompts_that_wait_are_read_together_and_a_known_beginning_not_again(models, right):
    lane, sizes = lane_of(models)
    beginning = [2 + k % 45 for k in range(40)]
    jobs = [job_of("rlora", [*beginning, 7], 30), job_of("base", [3, 4], 20), job_of("mtllora", [5], 20, task=1)]
    jobs += [job_of("rlora", [9, 8], 20)]
    lane.waiting.extend(jobs)
    for _ in range(2):
        lane.round(64)
    assert sizes[0] == (1, 41)
    assert (3, 2) in sizes
    late = [job_of("rlora", [*beginning, 11, 12], 6), job_of("mtllora", [*beginning, 11], 6, task=0)]
    lane.waiting.extend(late)
    sizes.clear()
    while lane.jobs():
        lane.round(64)
    assert [size for size in sizes if size[1] > 1] == [(1, 2), (1, 41)]
    for job in (*jobs, *late):
        assert job.decoder.ids == right(job), (job.model, job.task)


def test_no_branches_are_prepared_anew_while_rows_go_on(models, monkeypatch):
    made = []
    keep = inference.keep
    monkeypatch.setattr(inference, "keep", lambda plan, *args: made.append(plan.method.name) or keep(plan, *args))
    lane, _ = lane_of(models)
    kinds = [("rlora", None), ("multilora", None), ("base", None), *(("mtllora", task) for task in (0, 1, 0))]
    lane.waiting.extend(job_of(name, [3 + k, 4], 12, task) for k, (name, task) in enumerate(kinds))
    for _ in range(3):
        lane.round(64)
    made.clear()
    for _ in range(6):
        lane.round(64)
    assert len(lane.batch.jobs) >= 4
    assert made == []


def test_more_tasks_than_are_kept_prepared_are_computed_together(models, right, monkeypatch):
    monkeypatch.setattr(Store, "MOST", 2)
    lane, _ = lane_of(models)
    jobs = [job_of("mtllora", [3 + k, 4], 4 + k, task=k % 2) for k in range(4)]
    lane.waiting.extend(jobs)
    while lane.jobs():
        lane.round(64)
    for job in jobs:
        assert job.decoder.ids == right(job), job.task


def test_what_fails_ends_every_answer(models):
    """Also those whose prompts are not read yet: none is left for somebody to wait for."""

    def fails(*args, **words):
        raise RuntimeError("no memory")

    lane = _Lane(models["base"].model, fails)
    jobs = [job_of("base", [3] * 9, 5) for _ in range(3)]
    lane.waiting.extend(jobs)
    with pytest.raises(RuntimeError, match="no memory"):
        lane.round(4)
    lane.fail()
    assert {job.finish for job in jobs} == {"failed"}
    assert not lane.jobs()


def test_base_and_adapters_of_several_methods_share_one_batch(models):
    base = models["base"].model
    assert Mixed(base, models).names == {"base", "rlora", "mtllora", "multilora", "lora"}


def test_an_adapter_that_changes_more_than_layers_is_answered_beside_them(models, right):
    jobs = answers(models, [("prompt", None), ("rlora", None)], Limits(), count=6)
    assert {job.model for job in jobs} == {"prompt", "rlora"}
    for job in jobs:
        if job.model == "rlora":
            assert job.decoder.ids == right(job)
        else:
            assert len(job.decoder.ids) == job.max_tokens or job.decoder.ids[-1] == 1
