from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from multiflora.tasks import Example, load_task, shipped_tasks
from multiflora.tasks.preview import pieces_of, preview, sample_examples

EXAMPLE = Example("sums", "sums-train-0", "1 + 2\nAnswer:", " 3", answer="3")


def byte_tokenizer():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(["Answer: 3"], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<eos>"]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def test_without_a_tokenizer_the_two_spans_show():
    assert preview(EXAMPLE).plain == "sums-train-0  answer: 3\n1 + 2↵\nAnswer:⟦ 3⟧⟦end of text⟧"


def test_choices_stand_in_the_title():
    example = Example("t", "t-0", "p", " b", (" a", " b"), 1)
    assert preview(example).plain.splitlines()[0] == "t-0  choices:  a | b"


def test_with_a_tokenizer_every_token_that_carries_loss_is_marked():
    tokenizer = byte_tokenizer()
    ids = [tokenizer(text).input_ids for text in (EXAMPLE.prompt, EXAMPLE.completion)]
    loss = [False] * len(ids[0]) + [True] * (len(ids[1]) + 1)
    pieces = pieces_of(tokenizer, [*ids[0], *ids[1], tokenizer.eos_token_id], loss)
    assert "".join(text for text, loss in pieces if not loss) == EXAMPLE.prompt
    assert "".join(text for text, loss in pieces if loss) == EXAMPLE.completion + "<eos>"
    text = preview(EXAMPLE, pieces).plain
    assert text.endswith("⟦<eos>⟧")
    assert text.count("⟦") == len(ids[1]) + 1


def test_loss_is_in_the_same_style_everywhere_and_nothing_else_is():
    text = preview(EXAMPLE)
    styled = {text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)}
    assert styled == {"⟦ 3⟧", "⟦end of text⟧"}


def test_a_character_of_several_tokens_shows_once():
    tokenizer = byte_tokenizer()
    ids = tokenizer("é ✓ ü").input_ids
    pieces = pieces_of(tokenizer, ids, [False] * len(ids))
    assert "".join(text for text, _ in pieces) == "é ✓ ü"
    assert not any("\ufffd" in text for text, _ in pieces)
    assert len(pieces) > len("é ✓ ü")


def test_markup_in_the_data_stays_as_it_is():
    assert "[bold]x[/bold]" in preview(Example("t", "t-0", "[bold]x[/bold]", " y")).plain


def test_samples_of_a_hub_task_need_no_network_and_a_generator_makes_rows():
    hub = sample_examples(shipped_tasks()["qnli"])
    assert [e.completion for e in hub] == [" yes", " no"]
    made = sample_examples(shipped_tasks()["rg_chain_sum"], count=2)
    assert [e.task for e in made] == ["rg_chain_sum"] * 2
    assert made == sample_examples(load_task("rg_chain_sum"), count=2)
