"""The contract of tasks: each row's reaches the adapter it is meant for, by that adapter's list, or it is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from contract.cases import IDS, TASKS, layers, logits, relative, stir
from multiflora import AdapterError, auxiliary_loss, task
from multiflora.context import chosen_positions, find
from multiflora.training.losses import project_only


def two(case, tiny_llama):
    """A model with the adapter "default" of [verse, prose] and "two" of [prose, verse, drama], which is in use."""
    model = stir(case.adapt(tiny_llama()))
    model.add_adapter("two", case.config(task_names=["prose", "verse", "drama"]))
    model.set_adapter("two")
    return stir(model, 2).eval()


def test_names_by_each_adapter_s_own_list(case, tiny_llama):
    """A task's name is looked up in the list of the adapter that is in use, whatever other adapters say."""
    model = two(case, tiny_llama)
    wanted = logits(model, torch.tensor([2, 1]))
    assert torch.equal(logits(model, ["drama", "verse"]), wanted)
    with task(model, ["drama", "verse"]):
        assert torch.equal(logits(model, None), wanted)
    with pytest.raises(AdapterError, match="from 0 to 3, but the adapter has 3 tasks"):
        logits(model, torch.tensor([0, 3]))
    with pytest.raises(AdapterError, match="no task 'comedy'"), task(model, "comedy"):
        pass
    model.set_adapter("default")
    assert torch.equal(logits(model, ["verse", "prose"]), logits(model, torch.tensor([0, 1])))
    with pytest.raises(AdapterError, match=r"no task 'drama'; its tasks are verse, prose"):
        logits(model, ["drama", "verse"])


def test_names_in_a_mixed_batch(case, tiny_llama):
    """In a batch of several adapters, each row's name is looked up in its own adapter's list."""
    model = two(case, tiny_llama)
    second = logits(model, ["verse", "drama"])[1]
    model.set_adapter("default")
    first = logits(model, ["prose", "verse"])[0]
    with torch.no_grad():
        mixed = model(input_ids=IDS, task_id=["prose", "drama"], adapter_names=["default", "two"]).logits
    assert torch.allclose(mixed[0], first, atol=1e-5)
    assert torch.allclose(mixed[1], second, atol=1e-5)


def test_two_threads(case, tiny_llama):
    """Two threads with tasks of their own on one model do not get each other's."""
    model = stir(case.adapt(tiny_llama()))
    wanted = {}
    for name in ("verse", "prose"):
        with task(model, name):
            wanted[name] = logits(model, None)
    wrong, together = [], threading.Barrier(2)

    def run(name):
        for _ in range(6):
            with task(model, name):
                together.wait(timeout=60)
                wrong.extend([name] if not torch.equal(logits(model, None), wanted[name]) else [])

    threads = [threading.Thread(target=run, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert find(model).default is None


def test_generate_by_name(case, tiny_llama):
    """generate takes task_id as a name, an id, or one for each row: with peft, without task_type, with add_adapter."""
    words = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    made = [stir(get_peft_model(tiny_llama(), case.config(task_type=kind))) for kind in ("CAUSAL_LM", None)]
    native = tiny_llama()
    native.add_adapter(case.config())
    made.append(stir(native))
    for model in made:
        model.eval()
        both = model.generate(**words, task_id=["prose", "verse"])
        assert torch.equal(model.generate(**words, task_id=TASKS), both)
        for row, name in enumerate(("prose", "verse")):
            alone = model.generate(**words, task_id=name)
            assert torch.equal(alone[row], both[row])
            assert torch.equal(model.generate(**words, task_id=int(TASKS[row])), alone)
        with pytest.raises(AdapterError, match="no task 'drama'"):
            model.generate(**words, task_id="drama")
        with pytest.raises(AdapterError, match="one for each token"):
            model.generate(**words, task_id=torch.zeros_like(IDS))


def test_the_backbone_alone(case, tiny_llama):
    """The backbone called by itself takes task_id too, and remembers none of an earlier batch."""
    model = stir(case.adapt(tiny_llama()))
    wanted = model.get_base_model().model(input_ids=IDS, task_id=TASKS)[0]
    assert relative(model.get_base_model().lm_head(wanted), logits(model)) < 1e-5
    if case.method.needs_task():
        with pytest.raises(AdapterError, match="needs the task of each row"):
            model.get_base_model().model(input_ids=IDS)
    else:
        assert torch.equal(model.get_base_model().model(input_ids=IDS)[0], wanted)


def test_two_passes_before_the_gradient(case, tiny_llama):
    """Gradients of two passes at once are right under gradient checkpointing: each block knows its own pass."""
    model = stir(case.adapt(tiny_llama(), lora_dropout=0.0, **no_head_dropout(case))).train()

    def grads():
        model.zero_grad()
        passes = [model(input_ids=IDS, labels=IDS, task_id=tasks).loss for tasks in (TASKS, 1 - TASKS, TASKS[:1])]
        with task(model, "prose"):
            passes.append(model(input_ids=IDS, labels=IDS).loss)
        sum(one * weight for one, weight in zip(passes, (1, 2, 3, 4), strict=True)).backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    plain = grads()
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert relative(grads(), plain) < 1e-4


def no_head_dropout(case):
    """Settings that turn a method's own dropout off."""
    return {"head_dropout": 0.0} if hasattr(case.method.config, "head_dropout") else {}


class Experts(nn.Module):
    """A mixture: each token to one of two experts, which see theirs side by side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.route = nn.Embedding(50, 8), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.route.weight.requires_grad_(False)

    def forward(self, input_ids):
        """(rows, length) ids to (rows, length, 8)."""
        x = self.embed(input_ids).flatten(0, 1)
        to, y = self.route(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            at = (to == number).nonzero().flatten()
            y = y.index_copy(0, at, expert(x[at]))
        return y.view(*input_ids.shape, -1)


def test_experts_do_not_guess(case):
    """Where tokens come in no order of rows, a batch of one task is exact and one of several is refused."""
    model = stir(case.adapt(Experts(), target_modules=r".*experts\.\d")).eval()
    x = model.get_base_model()
    to = x.route(x.embed(IDS).flatten(0, 1)).argmax(-1)
    assert 0 < int(to.sum()) < to.numel()
    one = model(IDS, task_id=torch.tensor([1, 1]))
    assert torch.equal(one, model(IDS, task_id=torch.tensor([1])))
    assert torch.allclose(one[:1], model(IDS[:1], task_id=[1]), atol=1e-6)
    for rows in (IDS, IDS[:, :1], IDS.flatten().view(7, 2)):
        tasks = torch.arange(len(rows)) % 2
        if case.method.needs_task():
            with pytest.raises(AdapterError, match="not in the order of the rows"):
                model(rows, task_id=tasks)
        else:
            model(rows, task_id=tasks)


def test_output_head_at_chosen_positions(case, tiny_llama):
    """The output head under a projection of chosen positions gets the tasks of those positions."""
    model = stir(case.adapt(tiny_llama(), target_modules=["q_proj", "lm_head"])).eval()
    whole = logits(model).flatten(0, 1)
    # four of the first row's and two of the second's: as many as divide by two
    positions = torch.tensor([0, 2, 3, 6, 8, 12])
    for tasks in (TASKS, TASKS[:, None].expand(2, 7)):
        with (
            torch.no_grad(),
            project_only(model.get_output_embeddings(), positions),
            chosen_positions(model, positions),
        ):
            assert torch.allclose(model(input_ids=IDS, task_id=tasks).logits, whole[positions], atol=1e-6)
    with torch.no_grad():
        last = model(input_ids=IDS, task_id=TASKS, logits_to_keep=3).logits
    assert torch.allclose(last, whole.view(2, 7, -1)[:, -3:], atol=1e-6)


def test_an_encoder_and_a_decoder(case):
    """A decoder's tokens take its own padding, and cross-attention that of what it reads, at equal lengths too."""
    shape = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = stir(case.adapt(T5ForConditionalGeneration(T5Config(**shape, pad_token_id=0, decoder_start_token_id=0))))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
    other = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
    seen = {}

    def watch(layer, args, output):
        kept = layer.routing.tokens(layer.name, args[0]).keep()
        seen[layer.name] = None if kept is None else kept.view(2, -1)

    hooks = [layer.register_forward_hook(watch) for layer in layers(model)]
    words = {"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": IDS, "task_id": TASKS}
    model(**words, decoder_attention_mask=other)
    of_decoder = {name: kept for name, kept in seen.items() if "decoder" in name}
    reads = {name for name in of_decoder if "EncDecAttention.k" in name or "EncDecAttention.v" in name}
    assert len(reads) == 2
    assert all(torch.equal(kept, mask) for name, kept in seen.items() if name in reads or "encoder." in name[:8])
    assert all(torch.equal(kept, other) for name, kept in of_decoder.items() if name not in reads)
    model(**words)
    assert all(seen[name] is None for name in of_decoder if name not in reads)
    for hook in hooks:
        hook.remove()
    rows = model.generate(input_ids=IDS, task_id=["prose", "verse"], max_new_tokens=3, num_beams=2)
    assert torch.equal(rows[0], model.generate(input_ids=IDS, task_id="prose", max_new_tokens=3, num_beams=2)[0])


def test_a_failed_pass_leaves_nothing(case, tiny_llama):
    """A pass that ends in an error leaves no task behind for the next."""
    model = stir(case.adapt(tiny_llama()))
    wanted = logits(model)
    with pytest.raises(IndexError):
        model(input_ids=IDS + 1000, task_id=1 - TASKS)
    assert find(model).now().ids is None
    assert torch.equal(logits(model), wanted)
    assert auxiliary_loss(model.eval()) == 0.0
