"""Run by test_original.py in a process of its own: the package's main.py, its weights and its logits.

python run_original.py MAIN.py SPEC.json OUT.pt
"""

import importlib.util
import json
import sys

import torch


def main(source, spec, out):
    loading = importlib.util.spec_from_file_location("original_main", source)
    original = importlib.util.module_from_spec(loading)
    sys.modules["original_main"] = original
    loading.loader.exec_module(original)
    with open(spec) as file:
        cases = json.load(file)
    torch.save({name: run(original, **case) for name, case in cases.items()}, out)


@torch.no_grad()
def run(original, cfg, tokens, prompt, loops, halting):
    torch.manual_seed(1)
    model = original.OpenMythos(original.MythosConfig(**cfg)).eval()
    for name, weight in model.state_dict().items():
        if not name.startswith("freqs"):
            weight.add_(torch.randn_like(weight), alpha=0.1)
    if halting is not None:
        model.recurrent.act.halt.bias.fill_(halting)
    ids = torch.randint(cfg["vocab_size"], (2, tokens))
    result = {"ids": ids, "state": model.state_dict()}
    for n in loops:
        result[f"whole_{n}"] = model(ids, n_loops=n)
        cache = {}
        steps = [model(ids[:, :prompt], n_loops=n, kv_cache=cache)]
        for at in range(prompt, tokens):
            steps.append(model(ids[:, at : at + 1], n_loops=n, kv_cache=cache, start_pos=at))
        result[f"cached_{n}"] = torch.cat(steps, 1)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
