"""The OpenMythos interface: what it takes, what it refuses, and that its parts are the model."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from open_mythos import main
from open_mythos.main import MythosConfig, OpenMythos
from tests.numerics.test_original import SMALL


def config(attention="mla", **changes):
    return MythosConfig(**{**SMALL, "attn_type": attention, **changes})


@pytest.fixture(params=["gqa", "mla"])
def model(request):
    return shaken(OpenMythos(config(request.param)).eval())


@torch.no_grad()
def shaken(model):
    """Weights far enough from their beginning that every part matters."""
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


@pytest.fixture
def ids():
    return torch.randint(53, (2, 9))


def causal(tokens):
    return torch.full((1, 1, tokens, tokens), -torch.inf).triu(1)


class TestConfig:
    def test_positions_are_the_original_s(self):
        cfg = MythosConfig(100, 64, 4, 2, 32, 3, 1, 1, "gqa")
        assert (cfg.vocab_size, cfg.attn_type, cfg.n_experts, cfg.dropout) == (100, "gqa", 64, 0.0)

    def test_it_can_be_changed_copied_and_compared(self):
        cfg = config()
        cfg.max_loop_iters = 5
        assert pickle.loads(pickle.dumps(cfg)) == cfg != config()
        assert MythosConfig.of(cfg) == MythosConfig.of(vars(cfg)) == cfg

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"n_head": 4}, "no field 'n_head'; did you mean 'n_heads'"),
            ({"wibble": 4}, "no field 'wibble'; it has vocab_size, dim"),
            ({"attn_type": "MLA"}, "'gqa' or 'mla', got 'MLA'; did you mean 'mla'"),
            ({"halting": "graves"}, "halting should be 'act' or 'last'"),
            ({"attn_type": "gqa", "n_heads": 5}, "dim=32 should be a multiple of n_heads=5"),
            ({"attn_type": "gqa", "n_kv_heads": 3}, "n_heads=4 should be a multiple of n_kv_heads=3"),
            ({"qk_rope_head_dim": 5}, "qk_rope_head_dim should be even, got 5"),
            ({"n_experts_per_tok": 7}, "n_experts_per_tok=7 is more than n_experts=6"),
            ({"dim": 32.0}, "dim should be a whole number of at least 1, got 32.0"),
            ({"vocab_size": 0}, "vocab_size should be a whole number of at least 1, got 0"),
            ({"prelude_layers": -1}, "prelude_layers should be a whole number of at least 0"),
            ({"act_threshold": 1.5}, "act_threshold should lie between 0 and 1, got 1.5"),
            ({"dropout": "none"}, "dropout should lie between 0 and 1"),
        ],
    )
    def test_what_no_model_can_be_built_from(self, changes, sentence):
        with pytest.raises(ValueError, match=sentence):
            config(**changes)

    def test_a_change_after_the_fact_is_checked_by_the_model(self):
        cfg = config()
        cfg.n_experts_per_tok = 99
        with pytest.raises(ValueError, match="n_experts_per_tok=99"):
            OpenMythos(cfg)

    @pytest.mark.parametrize("field", ["prelude_layers", "coda_layers", "n_shared_experts", "lora_rank"])
    def test_what_may_be_left_out(self, field, ids):
        model = OpenMythos(config(**{field: 0}))
        assert model(ids).isfinite().all()
        assert (model.recurrent.lora is None) == (field == "lora_rank")

    def test_without_act_the_last_loop_is_the_answer(self, ids):
        model = shaken(OpenMythos(config(halting="last")))
        seen = []
        model(ids, n_loops=4, watch=lambda n, state: seen.append(torch.equal(state.h, state.answer)))
        assert seen == [True] * 4
        assert model.recurrent.act is None

    def test_released_is_the_core_s_switch(self):
        loops = [config(released=flag).model().loop for flag in (False, True)]
        assert [loop.halt.as_released for loop in loops] == [False, True]
        assert [loop.mark.relative for loop in loops] == [True, False]
        scales = [
            OpenMythos(config(released=flag)).recurrent.lora.scale.weight.std() for flag in (False, True)
        ]
        assert scales[0] > 20 * scales[1]


class TestForward:
    @pytest.mark.parametrize("n_loops", [0, -1])
    def test_at_least_one_loop(self, model, ids, n_loops):
        with pytest.raises(ValueError, match=f"at least one step, got {n_loops}"):
            model(ids, n_loops=n_loops)

    def test_more_loops_than_trained(self, model, ids):
        assert model(ids, n_loops=40).isfinite().all()
        torch.testing.assert_close(model(ids), model(ids, n_loops=3))

    @pytest.mark.parametrize(
        ("ids", "sentence"),
        [
            (torch.zeros(1, 0, dtype=torch.long), "no tokens"),
            (torch.zeros(1, 33, dtype=torch.long), "33 tokens do not fit the model's context of 32"),
            (torch.tensor([[3, 53]]), "token 53 is outside the vocabulary of 0 to 52"),
            (torch.tensor([[-1]]), "token -1 is outside"),
            (torch.tensor([3, 4]), r"shape \(B, T\), got torch.int64 \(2,\)"),
            (torch.zeros(1, 3), "int64 or int32"),
            (torch.ones(1, 3, dtype=torch.bool), "int64 or int32"),
        ],
    )
    def test_input_that_means_nothing(self, model, ids, sentence):
        with pytest.raises(ValueError, match=sentence):
            model(ids)

    def test_a_full_cache_is_told(self, model):
        cache = {}
        model(torch.zeros(1, 32, dtype=torch.long), kv_cache=cache)
        with pytest.raises(ValueError, match="33 tokens do not fit"):
            model(torch.zeros(1, 1, dtype=torch.long), kv_cache=cache)

    def test_an_empty_cache_starts_at_zero(self, model, ids):
        with pytest.raises(ValueError, match="start_pos=4, but the cache holds 0 tokens"):
            model(ids, kv_cache={}, start_pos=4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_half_precision_runs_and_stays_close(self, model, ids, dtype):
        exact = model(ids).softmax(-1)
        half, cache = model.to(dtype), {}
        whole = half(ids)
        pieces = torch.cat([half(ids[:, :5], kv_cache=cache), half(ids[:, 5:], kv_cache=cache)], dim=1)
        assert whole.dtype == pieces.dtype == dtype
        assert (whole.float().softmax(-1) - exact).abs().max() < 0.1
        assert (pieces.float().softmax(-1) - exact).abs().max() < 0.1
        assert half.generate(ids, max_new_tokens=3, n_loops=5).shape == (2, 12)
        assert half.recurrent.injection.get_A().max() < 1

    def test_the_radius_stays_below_one_at_any_parameter(self, model, ids):
        injection = model.recurrent.injection
        for value in (-1e4, -17.5, 1e4):
            torch.nn.init.constant_(injection.log_A, value)
            assert 0 < injection.get_A().min() <= injection.get_A().max() < 1
            model(ids).sum().backward()
            assert injection.log_A.grad.isfinite().all()

    def test_act_s_mass_is_one_at_every_depth(self, model, ids):
        """Unless as released: a model that hardly halts then hands on hardly anything."""
        torch.nn.init.constant_(model.recurrent.act.halt.bias, -6.0)
        states = []
        model(ids, n_loops=2, watch=lambda n, state: states.append(state))
        assert (states[-1].left == 0).all()
        torch.testing.assert_close(states[-1].answer, states[-1].h, rtol=0.02, atol=0.05)


class TestGenerate:
    def test_greedy_is_the_argmax_of_the_forward(self, model, ids):
        out = model.generate(ids, max_new_tokens=6, n_loops=5, temperature=0)
        for at in range(9, 15):
            torch.testing.assert_close(out[:, at], model(out[:, :at], n_loops=5)[:, -1].argmax(-1))

    def test_chance_is_torch_s_own_or_a_seed_s(self, model, ids):
        def draw(**options):
            return model.generate(ids, max_new_tokens=6, n_loops=2, temperature=2.0, **options)

        torch.manual_seed(3)
        first, second = draw(), draw()
        torch.manual_seed(3)
        assert torch.equal(draw(), first)
        assert not torch.equal(first, second)
        assert torch.equal(draw(seed=5), draw(seed=5))

    def test_top_k_of_one_is_greedy_and_of_many_is_fine(self, model, ids):
        greedy = model.generate(ids, 5, 2, 0.0)
        assert torch.equal(model.generate(ids, 5, 2, 1.0, 1), greedy)
        assert model.generate(ids, 5, 2, 1.0, 10_000).shape == (2, 14)
        assert model.generate(ids, 5, 2, top_k=0, top_p=0.9, min_p=0.01, repetition_penalty=1.1).shape == (
            2,
            14,
        )

    def test_rows_that_end_early_are_filled_up(self, model, ids):
        free = model.generate(ids, 8, 2, 0.0)
        eos = int(free[0, 11])
        out = model.generate(ids, 8, 2, 0.0, eos=eos)
        end = (free[0, 9:] == eos).nonzero()[0, 0] + 9
        assert torch.equal(out[0, : end + 1], free[0, : end + 1])
        assert (out[0, end + 1 :] == eos).all()
        filled = model.generate(ids[:1], 8, 2, 0.0, eos=eos, pad=7)
        assert filled.shape[1] == end + 1

    def test_unequal_prompts_as_lists(self, model, ids):
        prompts = [ids[0].tolist(), ids[1, :4].tolist()]
        both = model.generate(prompts, 5, [2, 6], 0.0)
        assert both == [model.generate([p], 5, n, 0.0)[0] for p, n in zip(prompts, (2, 6), strict=True)]
        assert [len(tokens) for tokens in both] == [14, 9]

    def test_nothing_asked_nothing_made(self, model, ids):
        assert torch.equal(model.generate(ids, max_new_tokens=0), ids)

    def test_dropout_is_off(self, ids):
        model = shaken(OpenMythos(config(dropout=0.5)))
        assert torch.equal(model.generate(ids, 6, 2, 0.0), model.generate(ids, 6, 2, 0.0))
        assert model.training


class TestParts:
    @pytest.mark.parametrize("whole_table", [True, False])
    def test_the_model_by_hand_as_the_original_s_users_wrote_it(self, model, ids, whole_table):
        cfg = model.cfg
        width = cfg.qk_rope_head_dim if cfg.attn_type == "mla" else cfg.dim // cfg.n_heads
        table = main.precompute_rope_freqs(width, cfg.max_seq_len, cfg.rope_theta)
        cache, made = {}, []
        for start, end in ((0, 6), (6, 8), (8, 9)):
            freqs = table if whole_table else table[start:end]
            mask = causal(end - start)
            x = model.embed(ids[:, start:end])
            for i, layer in enumerate(model.prelude):
                x = layer(x, freqs, mask, cache, f"prelude_{i}")
            x = model.recurrent(x, x, freqs, mask, 4, cache)
            for i, layer in enumerate(model.coda):
                x = layer(x, freqs, mask, cache, f"coda_{i}")
            made.append(model.head(model.norm(x)))
        torch.testing.assert_close(torch.cat(made, 1), model(ids, n_loops=4), atol=1e-4, rtol=1e-4)

    def test_without_a_mask_everything_is_seen(self, model, ids):
        attention, x = model.prelude[0].attn, torch.randn(1, 5, 32)
        freqs = main.precompute_rope_freqs(8 if model.cfg.attn_type == "gqa" else 6, 5)
        x[:, 4] += 1
        seen, hidden = attention(x, freqs), attention(x, freqs, causal(5))
        assert not torch.allclose(seen[:, 0], hidden[:, 0])
        torch.testing.assert_close(seen[:, 4], hidden[:, 4])
        bools = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
        torch.testing.assert_close(attention(x, freqs, bools), hidden)

    def test_masks_are_spread_out(self, model):
        """Over rows and heads, and one that says which keys are there over the queries."""
        attention, x = model.prelude[0].attn, torch.randn(2, 5, 32)
        freqs = main.precompute_rope_freqs(8 if model.cfg.attn_type == "gqa" else 6, 5)
        whole = attention(x, freqs, causal(5))
        for fewer in (causal(5)[0, 0], causal(5)[0]):
            torch.testing.assert_close(attention(x, freqs, fewer), whole)
        there = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, -torch.inf, -torch.inf]])[:, None, None]
        masked = attention(x, freqs, there)
        torch.testing.assert_close(masked[1:], attention(x[1:, :5], freqs, there[1:].expand(-1, -1, 5, -1)))
        torch.testing.assert_close(masked[:1], attention(x[:1], freqs))

    def test_masks_and_tables_that_do_not_fit(self, model):
        attention, x = model.prelude[0].attn, torch.randn(1, 5, 32)
        freqs = main.precompute_rope_freqs(8 if model.cfg.attn_type == "gqa" else 6, 5)
        with pytest.raises(ValueError, match="the rotary table has 4 positions"):
            attention(x, freqs[:4])
        with pytest.raises(ValueError, match=r"should be \(1, 1, 5, 5\), got \(1, 1, 4, 4\)"):
            attention(x, freqs, causal(4))
        with pytest.raises(ValueError, match="0 where a token may look and -inf"):
            attention(x, freqs, causal(5) + 1.5)

    def test_parts_are_windows_on_the_model(self, model, ids):
        before = model(ids)
        ffn = model.recurrent.block.ffn
        x = torch.randn(1, 4, 32)
        torch.testing.assert_close(ffn.router(x), x @ ffn.core.router.mT)
        alone = sum(expert(x) for expert in ffn.shared_experts)
        for expert in ffn.routed_experts:
            for weight in expert.parameters():
                weight.data.zero_()
        torch.testing.assert_close(ffn(x), alone, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(model(ids), before)

    def test_a_dense_expert_is_the_block_s(self, model):
        block, x = model.coda[0], torch.randn(2, 3, 32)
        core = model.lm.coda[0].ffn
        torch.testing.assert_close(block.ffn(x), core.down(core_act(core.gate_up(x))))
        assert isinstance(block.attn, main.MLAttention if model.cfg.attn_type == "mla" else main.GQAttention)

    def test_small_functions(self):
        h = torch.randn(2, 3, 32)
        marked = main.loop_index_embedding(h, 2, 4)
        expected = torch.tensor([2.0, 0.02]).sin().tolist() + torch.tensor([2.0, 0.02]).cos().tolist()
        torch.testing.assert_close(marked[0, 0] - h[0, 0], torch.tensor(expected + [0.0] * 28))
        lora = main.LoRAAdapter(32, 4, 3)
        torch.testing.assert_close(lora(h, 2), (lora.down(h) * lora.scale.weight[2]) @ lora.B)
        torch.testing.assert_close(lora(h[0], 2), lora(h, 2)[0])
        with pytest.raises(IndexError, match="loop_t=-1"):
            lora(h, -1)
        torch.testing.assert_close(lora(h, 9), lora(h, 2))
        act = main.ACTHalting(32)
        torch.testing.assert_close(act(h), act.halt(h).squeeze(-1).sigmoid())


def core_act(middle):
    gate, up = middle.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


class TestWindows:
    """What a model shows of its core."""

    def test_a_module_put_in_its_place_is_refused(self, model):
        for part, name in (
            (model, "head"),
            (model, "prelude"),
            (model.recurrent, "act"),
            (model.recurrent, "norm"),
        ):
            with pytest.raises(AttributeError, match=f"{name} shows a part of the core; replace it there"):
                setattr(part, name, torch.nn.Identity())

    def test_weights_are_the_model_s_own(self, model, ids):
        """Written, frozen and given a gradient through the window where they are not a part of a stack."""
        moe, lora = model.recurrent.block.ffn, model.recurrent.lora
        moe.router_bias += 0.5
        moe.router_bias = moe.router_bias + 0.25
        assert torch.equal(model.lm.loop.layers[0].ffn.bias, torch.full((6,), 0.75))
        lora.B = torch.nn.Parameter(torch.ones_like(lora.B))
        assert torch.equal(model.lm.loop.adapt.up.weight, torch.ones_like(lora.B.T))
        model.prelude[0].requires_grad_(False)
        model.recurrent.block.ffn.router.requires_grad_(False)
        model(ids).sum().backward()
        assert model.lm.loop.layers[0].ffn.router.grad is None
        assert model.lm.prelude[0].ffn.down.weight.grad is None
        assert model.recurrent.lora.scale.weight.grad is not None
        assert len(list(model.coda.parameters())) == len(list(model.lm.coda.parameters()))
        assert not model.recurrent.training
        assert not model.coda[0].training

    def test_tables_for_the_layers(self, model):
        whole = main.precompute_rope_freqs(8, 32, model.cfg.rope_theta)
        table = model.freqs_cis_mla if model.cfg.attn_type == "mla" else model.freqs_cis
        assert table.shape[0] == model.cfg.max_seq_len
        assert table.dtype == whole.dtype

    def test_a_config_may_be_anything_with_its_fields(self, model):
        from types import SimpleNamespace

        assert OpenMythos(SimpleNamespace(**vars(model.cfg))).cfg == model.cfg
        with pytest.raises(
            TypeError, match="expected a MythosConfig or a mapping of its fields, got NoneType"
        ):
            OpenMythos(None)


class TestWeights:
    def test_the_names_are_the_original_s(self, model):
        names = model.to_original().keys()
        assert {
            "freqs_cis",
            "freqs_cis_mla",
            "recurrent.act.halt.bias",
            "recurrent.lora.scale.weight",
        } <= names
        assert "recurrent.block.ffn.routed_experts.5.gate.weight" in names
        assert ("prelude.1.attn.q_up_nope.weight" in names) == (model.cfg.attn_type == "mla")

    def test_a_part_may_be_loaded(self, model):
        part = {name: weight for name, weight in model.to_original().items() if "coda" not in name}
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"lm.coda"):
            model.load_state_dict(part)
        found = model.load_state_dict(part | {"surprise": torch.zeros(1)}, strict=False)
        assert found.missing_keys
        assert all("coda" in name for name in found.missing_keys)
        assert found.unexpected_keys == ["surprise"]

    def test_any_part_of_the_original_s_may_be_loaded(self, model):
        """One map of one expert, gate without up, half of a query map: nothing is dropped unsaid."""
        whole = model.to_original()
        for name, weight in whole.items():
            if name in ("freqs_cis", "freqs_cis_mla", "embed.weight", "head.weight"):
                continue
            found = model.load_state_dict({name: weight + 1}, strict=False)
            assert not found.unexpected_keys
            now = model.to_original()
            assert [key for key in whole if not torch.equal(now[key], whole[key])] == [name]
            model.load_state_dict(whole)
        model.load_state_dict({"embed.weight": whole["embed.weight"] + 1}, strict=False)
        assert torch.equal(model.head.weight, whole["embed.weight"] + 1)
        model.load_state_dict(whole)

    def test_parts_speak_the_original_s_names(self, model):
        """Saved from one and loaded into another: windows on a model, a model inside another module."""
        other, whole = OpenMythos(model.cfg), model.to_original()
        other.recurrent.load_state_dict(model.recurrent.state_dict())
        for mine, theirs in zip(other.prelude, model.prelude, strict=True):
            mine.load_state_dict(theirs.state_dict())
        for name, weight in other.to_original().items():
            if name.startswith(("recurrent.", "prelude.")):
                assert torch.equal(weight, whole[name])
        assert {"attn.wo.weight", "ffn.down.weight"} <= model.prelude[0].state_dict().keys()
        assert {"lora.B", "act.halt.bias", "injection.log_A"} <= model.recurrent.state_dict().keys()
        outer = torch.nn.ModuleDict({"inside": OpenMythos(model.cfg)})
        outer.load_state_dict({f"inside.{name}": weight for name, weight in whole.items()})
        assert all(torch.equal(part, whole[name]) for name, part in outer["inside"].to_original().items())
        with pytest.raises(RuntimeError, match=r"norm.weight has shape \(7,\), but here it is \(32,\)"):
            model.recurrent.load_state_dict({"norm.weight": torch.zeros(7)}, strict=False)

    def test_what_is_missing_of_a_stack_is_said(self, model):
        whole, lost = model.to_original(), "recurrent.block.ffn.routed_experts.0.up.weight"
        part = {name: weight for name, weight in whole.items() if name != lost}
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{lost}"'):
            OpenMythos(model.cfg).load_state_dict(part)
        assert OpenMythos(model.cfg).load_state_dict(part, strict=False).missing_keys == [lost]
        with torch.device("meta"):
            empty = OpenMythos(model.cfg)
        missing = empty.load_state_dict(part, strict=False, assign=True).missing_keys
        assert lost in missing
        assert empty.lm.loop.layers[0].ffn.gate_up.is_meta

    @pytest.mark.parametrize("assign", [True, False])
    def test_of_two_tied_weights_the_head_is_loaded_last(self, model, assign):
        other = OpenMythos(model.cfg)
        seven = torch.full_like(other.head.weight, 7.0)
        other.load_state_dict(model.to_original() | {"head.weight": seven}, assign=assign)
        assert other.head.weight is other.embed.weight
        assert torch.equal(other.head.weight, seven)
        other.lm.load_state_dict({"head.weight": seven + 1}, strict=False, assign=assign)
        assert torch.equal(other.embed.weight, seven + 1)

    def test_what_is_no_weight_is_unexpected(self, model):
        state = model.state_dict() | {"step": 3, "nothing": torch.zeros(0)}
        assert set(model.load_state_dict(state, strict=False).unexpected_keys) == {"step", "nothing"}
        odd = {"coda.0.ffn.gate.weight": 3}
        assert model.load_state_dict(odd, strict=False).unexpected_keys == [*odd]

    def test_a_part_can_be_saved(self, model, tmp_path):
        for part in (model.recurrent, model.prelude[0], model.recurrent.block.ffn):
            save_file(part.state_dict(), tmp_path / "part.safetensors")
            part.load_state_dict(load_file(tmp_path / "part.safetensors"))

    def test_what_a_training_script_saved(self, model, ids):
        """Its weights under "model", a wrapper's prefix before every name, the tied head left out."""
        weights = model.to_original()
        wrapped = {f"_orig_mod.module.{name}": weight for name, weight in weights.items()}
        headless = {name: weight for name, weight in weights.items() if name != "head.weight"}
        for state in ({"step": 3, "model": weights, "cfg": model.cfg}, wrapped, headless):
            again = OpenMythos.from_original(state, model.cfg, released=False).eval()
            assert torch.equal(again(ids), model(ids))
        other = weights | {"head.weight": weights["head.weight"] + 1}
        again = OpenMythos.from_original(other, model.cfg, released=False)
        assert torch.equal(again.embed.weight, other["head.weight"])
        for state in ("theirs.pt", {"embed.weight": [1.0]}):
            with pytest.raises(ValueError, match="expected a mapping of names to tensors"):
                OpenMythos.from_original(state, model.cfg)

    def test_an_adapter_of_rank_zero_is_nothing(self, ids):
        plain = OpenMythos(config(lora_rank=0))
        empty = {"down.weight": (0, 32), "B": (0, 32), "scale.weight": (3, 0)}
        state = {f"recurrent.lora.{name}": torch.zeros(shape) for name, shape in empty.items()}
        again = OpenMythos.from_original(plain.to_original() | state, plain.cfg, released=False)
        torch.testing.assert_close(again.eval()(ids), plain.eval()(ids))

    def test_there_and_back(self, model, ids):
        again = OpenMythos.from_original(model.to_original(), model.cfg, released=False).eval()
        assert torch.equal(again(ids), model(ids))
        assert again.head.weight is again.embed.weight
        other = OpenMythos(model.cfg).eval()
        other.load_state_dict(model.to_original())
        assert torch.equal(other(ids), model(ids))

    def test_the_copy_is_a_copy(self, model, ids):
        state = model.to_original()
        again = OpenMythos.from_original(state, model.cfg)
        before = again(ids)
        for weight in state.values():
            weight.zero_()
        assert torch.equal(again(ids), before)

    def test_foreign_or_broken_weights(self, model):
        state, cfg = model.to_original(), model.cfg
        with pytest.raises(ValueError, match=r"missing: norm\.weight; is the config"):
            OpenMythos.from_original({k: v for k, v in state.items() if k != "norm.weight"}, cfg)
        with pytest.raises(ValueError, match=r"no place for lm_head\.bias"):
            OpenMythos.from_original(state | {"lm_head.bias": state["norm.weight"]}, cfg)
        with pytest.raises(
            ValueError, match=r"norm.weight has shape \(31,\), but this config makes it \(32,\)"
        ):
            OpenMythos.from_original(state | {"norm.weight": state["norm.weight"][:31]}, cfg)
        with pytest.raises(ValueError, match=r"missing: .* and 3 more"):
            OpenMythos.from_original(state, MythosConfig.of(cfg, n_experts=8, prelude_layers=2))

    def test_halting_may_be_left_behind(self, model, ids):
        cfg = MythosConfig.of(model.cfg, halting="last")
        assert OpenMythos.from_original(model.to_original(), cfg)(ids).isfinite().all()
