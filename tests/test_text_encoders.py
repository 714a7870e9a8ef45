"""Textual inversion: learned vectors in the place of a word, and the files that carry them."""
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from text_encoders import CLIPConfig, OpenCLIPText, insert_vectors, placeholder_id, tokenize
from weights import read_learned, save_word

STAR = 265


def one_by_one(ids, embedded, vectors):
    """The published order: from right to left, the tail moved and cut at each occurrence."""
    ids, embedded, n = ids.clone(), embedded.clone(), ids.shape[1]
    for row in range(len(ids)):
        for column in reversed((ids[row] == STAR).nonzero().flatten().tolist()):
            new = [STAR] * len(vectors)
            ids[row] = torch.cat([ids[row, :column], torch.tensor(new), ids[row, column + 1:]])[:n]
            parts = [embedded[row, :column], vectors, embedded[row, column + 1:]]
            embedded[row] = torch.cat(parts)[:n]
    return ids, embedded


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_vectors_take_the_place_of_the_word(count):
    ids = torch.tensor([[1, 5, STAR, 6, 2, 0, 0], [STAR, STAR, 4, 4, STAR, 2, 0], [1, 3, 4, 5, 6, 7, 2],
                        [1, 5, 5, 5, 5, 5, STAR]])
    embedded, vectors = torch.randn(4, 7, 8), torch.randn(count, 8, requires_grad=True)
    new_ids, new = insert_vectors(ids, embedded, STAR, vectors)
    want_ids, want = one_by_one(ids, embedded, vectors.detach())
    assert torch.equal(new_ids, want_ids) and torch.equal(new, want)
    new.sum().backward()
    assert vectors.grad.sum() == 8 * (new_ids == STAR).sum()


def test_word_reaches_the_features():
    net = OpenCLIPText(CLIPConfig(text_width=32, text_heads=2, text_layers=2, embed_dim=0))
    ids, vectors = tokenize(["a *", "a dog"]), torch.randn(1, 32)
    plain, learned = net(ids), net(ids, learned={STAR: vectors})
    changed = (plain - learned).abs().amax(-1) > 1e-6
    assert not changed[0, :2].any() and changed[0, 2:].all() and not changed[1].any()
    with_row = net.token_embedding.weight[ids[1, 2]][None]
    torch.testing.assert_close(net(ids[:1], learned={STAR: with_row}), net(ids[1:]))


def test_files(tmp_path, message):
    vectors = torch.randn(2, 16)
    save_word(tmp_path / "ours.pth", "*", STAR, vectors.requires_grad_())
    published = {"string_to_token": {"*": torch.tensor(7)},  # its own id wins
                 "string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors)})}
    torch.save(published, tmp_path / "published.pth")
    torch.save({"*": vectors}, tmp_path / "simple.pt")
    torch.save({"*": vectors[0]}, tmp_path / "row.pt")
    save_file({"*": vectors.detach()}, tmp_path / "simple.safetensors")
    for name, token, want in (("ours.pth", STAR, vectors), ("published.pth", 7, vectors),
                              ("simple.pt", STAR, vectors), ("simple.safetensors", STAR, vectors),
                              ("row.pt", STAR, vectors[:1])):
        learned = read_learned(tmp_path / name, placeholder_id)
        assert list(learned) == [token] and torch.equal(learned[token], want) and learned[token].is_leaf

    torch.save({"*": nn.Linear(2, 2)}, tmp_path / "code.pt")  # any other class is still refused
    assert "not one of plain tensors" in message(read_learned, tmp_path / "code.pt", placeholder_id)
    torch.save({"step": 3}, tmp_path / "other.pt")
    assert "not a file of textual inversion" in message(read_learned, tmp_path / "other.pt", placeholder_id)
    assert "no such file" in message(read_learned, tmp_path / "nowhere.pth", placeholder_id)
    assert "tokens instead of one" in message(placeholder_id, "two words")
