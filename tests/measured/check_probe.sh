#!/usr/bin/env bash
# `memplan probe` beside `nvidia-smi`, field by field, while another process holds 10 GiB; then `memplan check`,
# which must subtract them. For a machine with a GPU and torch: tests/measured/check_probe.sh, results in $OUT.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-$(mktemp -d)}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD MEMPLAN_CACHE_DIR=$out/cache

job=(gpt2 --max_length 512 --bf16 --per_device_train_batch_size 1 --format json)
"$python" -m memplan check "${job[@]}" >"$out/check_free.json" || echo "check: exit code $?"

"$python" - <<'PY' &
import time, torch
held = torch.empty(10 << 30, dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
free, total = torch.cuda.mem_get_info()
print("holder sees", total, "bytes in all,", free, "free", flush=True)
time.sleep(120)
PY
holder=$!
trap 'kill $holder' EXIT
sleep 20

fields=index,name,uuid,pci.bus_id,memory.total,memory.reserved,memory.used,memory.free,ecc.mode.current
fields=$fields,mig.mode.current,compute_cap,driver_version
nvidia-smi --query-gpu=$fields --format=csv,noheader,nounits >"$out/smi.csv"
nvidia-smi --query-compute-apps=gpu_uuid,pid,process_name,used_memory --format=csv >"$out/smi_processes.csv"
nvidia-smi topo -m >"$out/smi_topo.txt" || true
nvidia-smi >"$out/smi.txt"
time "$python" -m memplan probe --format json >"$out/probe.json"
"$python" -m memplan probe | tee "$out/probe.txt"
"$python" -m memplan check "${job[@]}" >"$out/check_held.json" || echo "check: exit code $?"

"$python" - "$out" $fields <<'PY' | tee "$out/compared.txt"
import csv, json, sys
from pathlib import Path

import torch

out, fields = Path(sys.argv[1]), sys.argv[2].split(",")
probe = json.loads((out / "probe.json").read_text())
on = {True: "Enabled", False: "Disabled", None: "[N/A]"}
for row, card in zip(csv.reader((out / "smi.csv").open(), skipinitialspace=True), probe["cards"], strict=True):
    smi = dict(zip(fields, row, strict=True))
    ours = {
        "index": card["index"],
        "name": card["name"],
        "uuid": card["uuid"],
        "pci.bus_id": card["pci_bus_id"],
        **{f"memory.{n}": (card[f"{n}_bytes"] or 0) >> 20 for n in ("total", "reserved", "used", "free")},
        "ecc.mode.current": on[card["ecc"]],
        "mig.mode.current": on[card["mig"]] if card["mig"] or smi["mig.mode.current"] != "[N/A]" else "[N/A]",
        "compute_cap": "{}.{}".format(*card["compute_capability"]),
        "driver_version": probe["driver"],
    }
    for field, value in ours.items():
        verdict = "same" if str(value) == smi[field] else "DIFFERENT"
        print(f"{verdict:9} {field:18} ours {value}  nvidia-smi {smi[field]}")
    total = torch.cuda.mem_get_info(card["ordinal"])[1]
    verdict = "same" if total == card["torch_total_bytes"] else "DIFFERENT"
    print(f"{verdict:9} {'torch total':18} ours {card['torch_total_bytes']}  torch {total}")
    print(f"{'':9} {'not of processes':18} {card['hidden_bytes']} bytes of {card['used_bytes']} used")
for name in ("free", "held"):
    plan = json.loads((out / f"check_{name}.json").read_text())
    print(f"check, card {name}: {plan.get('verdict')}: {plan.get('reason') or plan}")
PY
rm -rf "$MEMPLAN_CACHE_DIR"
