"""A second model for codec experiments: Qwen2 shape (biases, no key norm), 4 KV heads of 32, taught by the lab model."""
import sys, os, json, time, random, math; T0 = time.time(); HERE = os.path.dirname(os.path.abspath(__file__)); sys.path.insert(0, HERE)
import numpy as np, torch, torch.nn.functional as F
from safetensors.torch import save_file, load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, AutoTokenizer
LIM = float(os.environ.get("TRAIN", 140)); D = "cuda"; OUT = os.environ["OUT"]
torch.backends.cuda.matmul.allow_tf32 = True; torch.manual_seed(0); random.seed(0)
tok = AutoTokenizer.from_pretrained(HERE + "/lab"); z = dict(np.load(HERE + "/tokens.npz"))
p = load_file(HERE + "/lab/model.int8.safetensors"); w = {}
for n, v in p.items():
    if n.endswith(".scale"): continue
    s = p.get(n + ".scale"); w[n] = v if s is None else (v.float() * s[:, None]).to(torch.bfloat16)
teacher = Qwen3ForCausalLM(Qwen3Config.from_pretrained(HERE + "/lab")); print(teacher.load_state_dict(w, strict=False)); teacher = teacher.to(D, torch.bfloat16).eval()
sys.argv = ["x"]; from lab import Model as LM, rot
torch.set_grad_enabled(True)
def sample(n):
    with torch.no_grad():
        mm = LM(HERE + "/lab", torch.bfloat16); g = torch.Generator(device=D).manual_seed(5)
        out = torch.from_numpy(np.concatenate([z[k][:256 * 200] for k in sorted(z) if k.startswith("cal_")]).astype(np.int64)).view(-1, 200)[:, :8][:1024].to(D); B = len(out)
        K = torch.zeros(mm.L, B, mm.H, n, mm.d, device=D, dtype=torch.bfloat16); V = torch.zeros_like(K); co, si = mm.rope(n); co, si = co.bfloat16(), si.bfloat16(); w_ = mm.w
        for t in range(n - 1):
            x = mm.emb[out[:, t]]; cs = (co[t], si[t])
            for l in range(mm.L):
                q_ = f"model.layers.{l}."; h = mm.rms(x, w_[q_ + "input_layernorm.weight"]); f = lambda nm, hh: (h @ w_[q_ + f"self_attn.{nm}_proj.weight"].T).view(B, hh, mm.d)
                q, k, v = f("q", mm.Hq), f("k", mm.H), f("v", mm.H); q = mm.rms(q, w_[q_ + "self_attn.q_norm.weight"]); k = mm.rms(k, w_[q_ + "self_attn.k_norm.weight"])
                K[l, :, :, t] = rot(k, cs); V[l, :, :, t] = v
                s_ = torch.matmul(rot(q, cs).view(B, mm.H, mm.G, mm.d), K[l, :, :, :t + 1].transpose(2, 3)) * mm.d ** -.5
                o = torch.matmul(s_.float().softmax(-1).bfloat16(), V[l, :, :, :t + 1])
                x = x + o.reshape(B, -1) @ w_[q_ + "self_attn.o_proj.weight"].T; h = mm.rms(x, w_[q_ + "post_attention_layernorm.weight"])
                x = x + (F.silu(h @ w_[q_ + "mlp.gate_proj.weight"].T) * (h @ w_[q_ + "mlp.up_proj.weight"].T)) @ w_[q_ + "mlp.down_proj.weight"].T
            if t + 1 >= out.shape[1]: out = torch.cat([out, torch.multinomial((mm.rms(x, w_["model.norm.weight"]) @ mm.head.T).float().softmax(-1), 1, generator=g)], 1)
    return out
gen = sample(900)
print("self text", gen.shape, time.time() - T0, flush=True)
real = torch.from_numpy(np.concatenate([z[k] for k in sorted(z) if k.startswith("cal_")]).astype(np.int64))
flat = torch.cat([real, gen.flatten().cpu()])
WORDS = "amber anchor apple arrow basil beacon birch bronze candle canyon cedar cherry cobalt copper coral crystal dagger delta eagle ember falcon fern flint forest garnet ginger glacier granite harbor hazel indigo ivory".split()
def recall(n):
    ids = []; ks = random.sample(WORDS, random.randint(2, 8)); vs = [str(random.randint(1000, 99999)) for _ in ks]; fill = lambda: flat[(o := random.randrange(len(flat) - 600)):o + random.randint(0, 240)].tolist()
    for k, v in zip(ks, vs): ids += fill() + tok(f"\nThe secret number of {k} is {v}.\n", add_special_tokens=False).input_ids
    order = list(range(len(ks))); 
    while len(ids) < n:
        random.shuffle(order)
        for j in order[:3]: ids += tok(f" The secret number of {ks[j]} is {vs[j]}.", add_special_tokens=False).input_ids
        if random.random() < .5: ids += fill()
    return torch.tensor(ids[:n])
cfg = Qwen2Config(vocab_size=8192, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4, intermediate_size=1152, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True, attn_implementation="sdpa")
m = Qwen2ForCausalLM(cfg).to(D); print(sum(x.numel() for x in m.parameters()) / 1e6, "M")
opt = torch.optim.AdamW(m.parameters(), lr=1.5e-3, betas=(.9, .95), weight_decay=.05); step = 0; t0 = time.time(); N, BS = 2048, 16
while time.time() - t0 < LIM:
    f = (time.time() - t0) / LIM; lr = 1.5e-3 * min(1, (step + 1) / 100) * max(.02, min(1, (1 - f) / .6))
    for g in opt.param_groups: g["lr"] = lr
    x = torch.stack([recall(N) if random.random() < .12 else flat[(o := random.randrange(len(flat) - N)):o + N] for _ in range(BS)]).to(D)
    with torch.autocast("cuda", torch.bfloat16):
        with torch.no_grad(): tl = teacher(x).logits
        lg = m(x).logits
    ls = F.cross_entropy(lg[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten()); kd = F.kl_div(lg.flatten(0, 1).float().log_softmax(-1), tl.flatten(0, 1).float().log_softmax(-1), log_target=True, reduction="batchmean")
    opt.zero_grad(); (ls * .5 + kd * .5).backward(); torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0); opt.step(); step += 1
    if step % 100 == 0: print(step, f"{ls.item():.3f} {kd.item():.3f} {time.time()-t0:.0f}", flush=True)
m = m.to(torch.bfloat16); os.makedirs(HERE + "/second", exist_ok=True); m.save_pretrained(HERE + "/second"); tok.save_pretrained(HERE + "/second")
print("saved", os.listdir(HERE + "/second"), time.time() - T0)
