"""Every key of a config with its default, unit, reason and range: a line a key."""
from typing import Any

from jaxlm.ranges import (Check, Key, above, at_least, between, choice, flag, fraction, integers, is_number,
                          is_scheduled, name, pairs, ref, rules, share, text, texts)


def _masking(mask=0.8, random=0.1, whole_words=False, max_ngram=1) -> dict[str, Key]:
  """What objectives that hide tokens let one set."""
  return dict(
      rate=Key(0.15, share()),                       # of a row's tokens that are predicted, special ones apart
      mask=Key(mask, between(0.0, 1.0)),             # of those, that become the mask token
      random=Key(random, between(0.0, 1.0)),         # and that become any token; the rest stay as they are
      whole_words=Key(whole_words, flag()),          # a word is hidden with all its pieces
      max_ngram=Key(max_ngram, at_least(1)),         # words (or tokens) hidden together: up to so many (SpanBERT: 10)
      geometric=Key(False, flag()),                  # n of them with probability ∝ 0.8ⁿ (SpanBERT); False: ∝ 1/n
  )


def _rollouts(kl_weight: float) -> dict[str, Key]:
  """What objectives whose policy writes their text let one set."""
  return dict(
      max_new_tokens=Key(512, at_least(1), ref('seq_len', then=lambda n: n // 2)),  # of an answer; other columns are the
      # question's
      temperature=Key(1.0, above(0.0)),              # of the policy, when it writes and when it learns
      verifier=Key('exact', name()),                 # exact contains f1 program (the task's, in a sandbox), the run of a
      # reward model, or "module:function" of (example, answer) -> reward
      kl_weight=Key(kl_weight, at_least(0.0)),       # of the KL to the policy at the start; 0: no copy (DAPO, Dr. GRPO)
      updates=Key(1, at_least(1)),                   # batches written by the same policy, an update each; 1: on-policy
  )


SCHEMA: dict[str, Any] = dict(
    seed=Key(0, at_least(0)),                        # every random stream of a run derives from it
    steps=Key(1_000, at_least(1)),                   # updates in the whole run
    batch_size=Key(32, at_least(1)),                 # examples (rows) an update, over all devices
    batch_ramp=Key((), pairs(lambda s, b: type(s) is int and s >= 1 and type(b) is int and b >= 1,
                             '(until this step, batch size)')),  # smaller batches first; then batch_size
    accumulation=Key(1, at_least(1)),                # microbatches a batch is cut into, to save memory
    seq_len=Key(1024, at_least(2)),                  # tokens a row
    log_every=Key(10, at_least(1)),                  # steps between lines in metrics.jsonl
    eval_every=Key(500, at_least(0)),                # steps between evaluations; 0: only after the last
    save_every=Key(500, at_least(0)),                # steps between checkpoints; 0: only after the last
    heartbeat_s=Key(100.0, at_least(1.0)),           # of several processes: one that gives no sign so long is gone
    watchdog_s=Key(3_600.0, at_least(0.0)),          # seconds without a step after which a run is given up; 0: never
    compiler_options=Key((), Check('a tuple of (name, value) pairs of XLA options', lambda x: all(
        isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str)
        and isinstance(p[1], (str, bool, int, float, type(None))) for p in x))),  # beside, or instead of, those in
    # sharding.OPTIONS; None takes one away
    tensorboard=Key(True, flag()),                   # also write metrics as TensorBoard events
    on_nonfinite=Key('stop', choice('stop', 'skip', 'rewind')),  # a loss or gradient that is not finite:
    # end the run, leave the update out, or go back to the last checkpoint and past the bad batches (PaLM)
    max_rewinds=Key(5, at_least(0)),                 # rewinds in one run before it is given up

    model=dict(
        family=Key('custom', name()),                # whose weight names are used with Hugging Face folders
        structure=Key('decoder', choice('encoder', 'decoder', 'encoder_decoder', 'two_stream')),  # what is connected;
        # who sees whom is the objective's. two_stream: XLNet's content and query
        mixer=Key('attention', name()),              # how tokens of a layer meet: attention rnn gru lstm mlstm
        width=Key(768, at_least(1)),                 # D, of the residual stream
        num_layers=Key(12, at_least(1)),             # L; of an encoder-decoder, the decoder's
        encoder_layers=Key(12, at_least(1), ref('model.num_layers')),  # of an encoder-decoder
        share_layers=Key(False, flag()),             # all layers are one (ALBERT)
        vocab_size=Key(0, at_least(0)),              # V; 0: the tokenizer's
        vocab_pad_to=Key(128, at_least(1)),          # embedding rows are rounded up to a multiple of this
        max_length=Key(1024, at_least(1), ref('seq_len')),  # learned positions there are
        tie_embeddings=Key(True, flag()),            # the output layer is the embedding, transposed
        embedding_scale=Key(1.0, above(0.0)),        # embeddings times this; sqrt(width) in Gemma and the 2017 model
        logit_scale=Key(1.0, above(0.0)),            # logits times this; 1 / sqrt(width) in T5
        logit_softcap=Key(0.0, at_least(0.0)),       # logits = c·tanh(logits / c); 0: none
        future_heads=Key(0, between(0, 16)),         # blocks that predict the 2nd, 3rd, … token ahead
        dropout=Key(0.0, fraction()),                # of embeddings and of each branch's output
        remat=Key('dots', name()),                   # what the backward pass recomputes: dots (all but products with
        # weights and what attention gives) none full names offload (names, kept in the host's memory)
        remat_names=Key((), texts()),                # of the two last: the checkpoint_name values that are kept
        scan=Key(True, flag()),                      # one compiled layer for all; False: a program a layer
        embedding=dict(
            width=Key(768, at_least(1), ref('model.width')),  # E; other than D, a projection stands between (ALBERT)
            project_bias=Key(True, flag()),          # on that projection
            project_first=Key(False, flag()),        # words alone pass it (OPT); False: the sum with positions does
            norm=Key(False, flag()),                 # of the sum of embeddings (BERT, BLOOM)
            token_types=Key(0, at_least(0)),         # rows of a token-type table; in XLNet, segments told apart
            task_types=Key(0, at_least(0)),          # rows of a table of tasks that a token is read for (ERNIE)
            zeroed=Key(-1, at_least(-1)),            # id that embeds as zero, its row rescaled (ESM-2); -1: none
        ),
        head=dict(                                   # what stands between hidden states and answers
            lm=Key(True, flag()),                    # scores of the vocabulary; False: a body without them
            bias=Key(False, flag()),                 # on those
            transform=Key('none', choice('none', 'linear', 'full')),  # before them: dense; or dense, activation, norm
            transform_bias=Key(True, flag()),        # on that dense
            labels=Key('none', choice('none', 'sequence', 'token', 'span', 'replaced')),  # a second head: of a row, of
            # each token, start and end, whether a token was replaced (ELECTRA)
            num_labels=Key(2, at_least(1)),          # classes; 1 with "sequence": regression
            label_bias=Key(True, flag()),
            pool=Key('first', choice('first', 'mean', 'last', 'splade')),  # what stands for a row: a token's or
            # all tokens' states; with objective contrast also a weight for each entry of the vocabulary (splade)
            pooler=Key('none', choice('none', 'tanh', 'activation', 'full')),  # what it passes before labels: nothing;
            # dense and tanh (BERT); dense and the MLP's activation; dense, activation, norm (ModernBERT)
            pooler_bias=Key(True, flag()),
        ),
        attention=dict(
            num_heads=Key(12, at_least(1)),          # N
            num_kv_heads=Key(12, at_least(1), ref('model.attention.num_heads')),  # K; divides N
            head_dim=Key(64, at_least(1), ref('model.width', 'model.attention.num_heads',
                                              then=lambda d, n: d // n)),  # H
            bias=Key(True, flag()),                  # on queries, keys and values
            out_bias=Key(True, flag()),              # on the output projection
            qk_norm=Key('none', choice('none', 'head', 'heads', 'all')),  # norm of queries and keys: over each head;
            # likewise, a scale a head (Cohere); over all heads at once (OLMo 2)
            softcap=Key(0.0, at_least(0.0)),         # scores = c·tanh(scores / c); 0: none
            scale=Key(0.0, at_least(0.0)),           # scores times this; 0: 1 / sqrt(head_dim)
            sink=Key(False, flag()),                 # a learned score a head that takes weight and gives no value
            dropout=Key(0.0, fraction()),            # of attention probabilities; dense kernel only
            windows=Key((0,), Check('a tuple of integers, each at least 0, and at least one', lambda x: bool(x)
                                    and integers(0).holds(x))),  # tokens seen back, itself included,
            # by layer, repeated over the depth; 0: all
            kernel=Key('auto', name()),              # dense, blockwise, ring, cudnn, "module:function"; auto: the fastest that is exact
            block=Key(512, at_least(1)),             # tokens in a block of the blockwise kernel
            latent=dict(                             # multi-head latent attention (DeepSeek-V2); kv_rank 0: none
                kv_rank=Key(0, at_least(0)),         # of what keys and values are made of, and the cache holds
                q_rank=Key(0, at_least(0)),          # likewise of queries; 0: they are made of x
                rope_dim=Key(64, at_least(2)),       # dims that rotate, beside head_dim; one such key for all heads
                value_dim=Key(64, at_least(1), ref('model.attention.head_dim')),  # of a head's values
            ),
        ),
        mlp=dict(
            width=Key(3072, at_least(0), ref('model.width', then=lambda d: d * 4)),  # F; 0: no MLP
            activation=Key('gelu_tanh', name()),     # gelu gelu_tanh relu relu2 silu tanh
            gated=Key(False, flag()),                # act(gate)·up: SwiGLU is silu gated, GeGLU gelu gated
            bias=Key(True, flag()),
        ),
        moe=dict(                                    # mixture of experts in the MLP's place; num_experts 0: none
            num_experts=Key(0, at_least(0)),         # E
            top_k=Key(2, at_least(1)),               # experts a token goes to
            width=Key(3072, at_least(0), ref('model.mlp.width')),  # F of an expert
            every=Key(1, at_least(1)),               # layers first, first + every, … have experts, the others an MLP
            first=Key(0, at_least(0)),
            router=Key('softmax', choice('softmax', 'sigmoid')),
            normalise=Key(True, flag()),             # weights of the chosen experts sum to 1
            scale=Key(1.0, above(0.0)),              # weights times this
            router_bias=Key(False, flag()),          # added to choose experts, not to weigh them (DeepSeek-V3)
            num_groups=Key(1, at_least(1)),          # experts stand in groups, of which the best are looked at
            top_groups=Key(1, at_least(1)),
            shared_width=Key(0, at_least(0)),        # F of an expert that every token goes to; 0: none
            shared_gate=Key(False, flag()),          # it is weighed by a sigmoid (Qwen2-MoE)
            mode=Key('dropless', choice('dropless', 'capacity')),  # every choice is computed, or as many as fit
            capacity_factor=Key(1.25, above(0.0)),   # of an even share of a row's choices, that an expert takes
            balance_loss=Key(0.01, at_least(0.0)),   # times the load-balance loss (Fedus et al. 2021)
            z_loss=Key(0.0, at_least(0.0)),          # times the router's log²Z (Zoph et al. 2022: 1e-3)
        ),
        norm=dict(
            kind=Key('layernorm', choice('layernorm', 'rmsnorm')),
            bias=Key(True, flag()),                  # of LayerNorm
            eps=Key(1e-5, above(0.0)),
            offset=Key(0.0, at_least(0.0)),          # added to the stored scale: 1 in Gemma
        ),
        residual=dict(                               # x = post_norm(alpha·x + out_norm(f(in_norm(x))))
            in_norm=Key(True, flag()),               # pre-norm
            first_norm=Key(True, flag()),            # also of the very first branch (ModernBERT: not)
            out_norm=Key(False, flag()),             # before the sum (Gemma 2's sandwich)
            post_norm=Key(False, flag()),            # after the sum (2017, BERT, GPT-1)
            alpha=Key(1.0, at_least(0.0)),           # DeepNorm's scale of the skip path; 0: no skip path (RNNs)
            parallel=Key(False, flag()),             # attention and MLP read the same x (GPT-J, PaLM)
            parallel_norms=Key(False, flag()),       # each through its own in_norm (GPT-NeoX)
            final_norm=Key(True, flag()),            # before the output layer
        ),
        positions=dict(
            kind=Key('learned', name()),             # learned sinusoidal rope alibi buckets relative none
            offset=Key(0, at_least(0)),              # rows of a learned table before position 0 (RoBERTa, OPT, BART: 2)
            two_dims=Key(False, flag()),             # also by place in the blank (GLM): learned: a second table;
            # rope: half of the head each
            num_buckets=Key(32, at_least(2)),        # buckets: of T5's relative distances
            max_distance=Key(128, at_least(2)),      # beyond which they share the last one
            alibi_scale=Key(1.0, above(0.0)),        # of ALiBi's slopes
            alibi_rounded=Key(False, flag()),        # slope · position is rounded to bfloat16 (Falcon)
            rope=dict(
                base=Key(10_000.0, above(1.0)),      # longest wavelength / 2π, in tokens
                local_base=Key(0.0, at_least(0.0)),  # of layers with a window, unscaled (Gemma 3); 0: as the others
                fraction=Key(1.0, Check('above 0 and at most 1', lambda x: 0 < x <= 1)),  # of a head's dims that rotate
                interleaved=Key(False, flag()),      # pairs are neighbours (GPT-J); False: halves (GPT-NeoX)
                dtype=Key('float32', choice('float32', 'bfloat16', 'float16')),  # wavelengths are rounded to (ESM-2)
                scaling=Key('none', name()),         # none linear ntk yarn llama3
                factor=Key(1.0, at_least(1.0)),      # new length / trained length
                original_length=Key(1024, at_least(1), ref('seq_len')),  # tokens trained at
                low_freq_factor=Key(1.0, above(0.0)),   # llama3: wavelengths above original / this are scaled
                high_freq_factor=Key(4.0, above(0.0)),  # llama3: those below original / this are kept
                beta_fast=Key(32.0, above(0.0)),     # yarn: turns above which a dimension is kept
                beta_slow=Key(1.0, above(0.0)),      # yarn: turns below which it is scaled
                attention_factor=Key(0.0, at_least(0.0)),  # yarn: of cos and sin; 0: 0.1·ln(factor) + 1
            ),
        ),
        generator=dict(                              # ELECTRA's small masked LM, sharing embeddings; width 0: none
            width=Key(0, at_least(0)),
            num_layers=Key(12, at_least(1), ref('model.num_layers')),
            num_heads=Key(4, at_least(1)),
            mlp_width=Key(0, at_least(0), ref('model.generator.width', then=lambda d: d * 4)),
        ),
        peft=dict(                                   # what is trained in the place of all parameters
            method=Key('none', choice('none', 'lora', 'ia3', 'bottleneck', 'bitfit', 'prompt', 'prefix')),
            sites=Key((), pairs(lambda pattern, value: isinstance(pattern, str) and (
                value in ('in', 'out') or type(value) in (int, bool)), "(pattern of a place such as "
                "'attention/query', rank, True, False, 'in' or 'out')")),  # where; (): as the method's paper has it
            also=Key('', text()),                    # pattern of parameters that are trained and saved with it: a new head
            rank=Key(8, at_least(1)),                # lora: R, where sites say True
            alpha=Key(16.0, above(0.0)),             # lora: updates count alpha / rank
            stabilised=Key(False, flag()),           # lora: alpha / sqrt(rank)
            dora=Key(False, flag()),                 # lora: lengths of weights apart
            width=Key(64, at_least(1)),              # of a bottleneck, or of the encoder of virtual tokens
            parallel=Key(False, flag()),             # bottleneck: made of a branch's input; False: of its output
            strength=Key(1.0, above(0.0)),           # bottleneck: times this
            tokens=Key(20, at_least(1)),             # P, virtual ones before a text, of prompt and prefix
            encoder=Key('none', choice('none', 'mlp', 'lstm')),  # makes them of a table (P-tuning); prefix: mlp
            start=Key('vocabulary', choice('vocabulary', 'text', 'normal')),  # prompt: embeddings of drawn ids, of `text`
            text=Key('', text()),
            base=Key('same', choice('same', 'int8', 'nf4')),  # how weights that stay are kept (QLoRA)
            block=Key(64, at_least(4)),              # of them that share a scale
        ),
        init=dict(
            std=Key(0.02, above(0.0)),               # of weights
            embedding_std=Key(0.02, above(0.0), ref('model.init.std')),
            scale_by_depth=Key(True, flag()),        # what adds to the residual stream: std / sqrt(2·num_layers)
        ),
    ),

    objective=dict(
        name=Key('causal', name()),                  # which of the sub-configs below trains
        causal=dict(),                               # predict the next token; nothing to set
        multi_token=dict(),                          # and those after it: model.future_heads
        prefix=dict(                                 # predict how a text goes on from a beginning that is seen whole
            min_rate=Key(0.25, fraction()),          # of a document's tokens that are its beginning: drawn between
            max_rate=Key(0.75, Check('above 0 and at most 1', lambda x: 0 < x <= 1)),  # these. An encoder-decoder's
            # text is what fits whichever is drawn, here seq_len / 0.75 tokens; other columns are padding
        ),
        masked=_masking(),                           # predict hidden tokens from both sides
        replaced=_masking(mask=0.85, random=0.0),    # and tell which were filled wrongly (ELECTRA; large: rate 0.25)
        next_sentence=_masking(),                    # and whether one text follows the other (BERT)
        sentence_order=_masking(max_ngram=3, whole_words=True),  # and which of two comes first (ALBERT)
        translation=_masking(),                      # in a text and its translation (XLM): data.pair_field
        span=dict(                                   # predict spans that were cut out (T5)
            rate=Key(0.15, share()),                 # of a row's tokens
            mean=Key(3.0, at_least(1.0)),            # tokens a span
            tail=Key(False, flag()),                 # text may follow the last span; False: rows end with one, as T5's
            num_sentinels=Key(100, at_least(1)),     # tokens that stand for spans; a row needs rate·R / mean
        ),
        ul2=dict(                                    # predict what one of several kinds of noise took away
            denoisers=Key((('r', 0.15, 3.0, 1.0), ('r', 0.15, 8.0, 1.0), ('s', 0.25, 0.0, 1.0), ('x', 0.5, 3.0, 1.0),
                           ('x', 0.5, 8.0, 1.0), ('x', 0.15, 64.0, 1.0), ('x', 0.5, 64.0, 1.0)), Check(
                'a tuple of (mode, rate, mean, weight): r s or x, above 0 and below 1, 0 or at least 1, above 0',
                lambda x: bool(x) and all(
                    isinstance(d, tuple) and len(d) == 4 and d[0] in ('r', 's', 'x') and all(map(is_number, d[1:]))
                    and 0 < d[1] < 1 and (d[2] == 0 or d[2] >= 1) and d[3] > 0 for d in x))),  # Tay et al. 2022, table
            # 1; mean 0: the end of the row, in one piece. Rows are as long as the noise that shortens them least allows
            num_sentinels=Key(100, at_least(1)),     # the most that one of them needs
        ),
        permutation=dict(                            # predict some tokens in a random order (XLNet)
            rate=Key(1 / 6, share()),                # of a row's tokens; the others are context
            max_ngram=Key(5, at_least(1)),           # words in a span that is predicted, at most
            whole_words=Key(True, flag()),
            memory=Key(0, at_least(0)),              # tokens before the row's, read without gradient
        ),
        infilling=dict(                              # fill blanks (GLM)
            rate=Key(0.15, share()),                 # of a row's tokens, in short blanks
            mean=Key(3.0, above(0.0)),               # tokens a blank: Poisson's, without 0
            long=Key(0.5, between(0.0, 1.0)),        # of rows: one long blank a document, at its end (GLM-130B: 0.7)
            long_min=Key(0.5, Check('above 0 and at most 1', lambda x: 0 < x <= 1)),  # of a document, at least, in it
            sentences=Key(0.0, between(0.0, 1.0)),   # of rows have whole sentences as blanks, rate of the row
        ),
        fim=dict(                                    # next tokens, of documents whose middle comes last
            rate=Key(0.5, between(0.0, 1.0)),        # of documents
            spm=Key(0.5, between(0.0, 1.0)),         # of those: suffix, prefix, middle; else prefix, suffix, middle
            every=Key(256, at_least(8)),             # columns: one document is cut in so many, at most, and three
            # of them are kept free for its marks
        ),
        denoising=dict(                              # predict a whole text from a disturbed one (BART)
            rate=Key(0.3, Check('at least 0 and below 1', lambda x: 0 <= x < 1)),  # of tokens, in spans behind a mask
            mean=Key(3.0, at_least(1.0)),            # tokens a span: Poisson's, with 0
            permute=Key(1.0, between(0.0, 1.0)),     # of rows have their sentences in another order
            delete=Key(0.0, fraction()),             # of tokens, left out without a trace
            rotate=Key(0.0, between(0.0, 1.0)),      # of rows have their documents begin at another token
        ),
        # Of tasks, data.task:
        classify=dict(), multi_label=dict(), regress=dict(), tag=dict(), extract=dict(),
        answer=dict(                                 # tokens of answers
            target_length=Key(0, at_least(0)),       # columns of an encoder-decoder's answers; 0: seq_len
        ),
        contrast=dict(                               # embeddings of queries and documents (Karpukhin et al. 2020)
            temperature=Key(0.05, above(0.0)),       # cosines are divided by it
            negatives=Key(0, at_least(0)),           # documents of each query that are not its own, beside those of others
            dims=Key((), integers(1)),               # also of so many first dims alone (Kusupati et al. 2022, Matryoshka)
            flops=Key(0.0, at_least(0.0)),           # with head.pool splade: times what keeps weights few (Paria et al.
            # 2020, arXiv:2004.05665)
        ),
        prefer=dict(                                 # the better of two answers
            loss=Key('dpo', choice('dpo', 'ipo', 'orpo', 'simpo')),
            beta=Key(0.1, above(0.0)),               # how strongly the reference holds; of simpo, a scale: 2
            margin=Key(1.0, at_least(0.0)),          # simpo: by which the better is to be ahead
            smoothing=Key(0.0, Check('at least 0 and below 0.5', lambda x: 0 <= x < 0.5)),  # dpo: of labels that are wrong
            odds_weight=Key(0.1, above(0.0)),        # orpo
            by_token=Key(False, flag()),             # ipo: log-ratios are means over tokens, as trl's
        ),
        reward=dict(                                 # a number for an answer, by pairs (Bradley and Terry)
            centring=Key(0.0, at_least(0.0)),        # of the squared sum of both numbers, which pairs leave free: 0.01
        ),
        kto=dict(                                    # answers that are good, and others that are bad
            good=Key('good', text()),                # of a task of kind classify: the label of answers that are good
            beta=Key(0.1, above(0.0)),               # how strongly the reference holds
            good_weight=Key(1.0, above(0.0)),        # of a good answer; times their number it should be 1 to 4/3 of
            bad_weight=Key(1.0, above(0.0)),         # this, times that of bad ones (Ethayarajh et al. 2024, section 4.3)
        ),
        grpo=dict(                                   # the policy's own answers, by a verifier's reward (Shao et al. 2024)
            **_rollouts(kl_weight=0.04),
            group=Key(8, at_least(2)),               # answers to a question: batch_size / this are asked
            clip_low=Key(0.2, fraction()),           # how far below 1 a token's ratio to the policy that wrote it counts
            clip_high=Key(0.2, above(0.0)),          # how far above (DAPO: 0.28)
            normalisation=Key('sequence', choice('sequence', 'token', 'longest')),  # a mean over answers of means over
            # tokens; over all tokens (DAPO); over answers of sums over tokens / max_new_tokens (Dr. GRPO)
            by_std=Key(True, flag()),                # advantages in units of a group's deviation; Dr. GRPO: not
        ),
        ppo=dict(                                    # the same, by what a label head of the policy expects (Ouyang et al.
            # 2022): a value for each token
            **_rollouts(kl_weight=0.02),
            group=Key(1, at_least(1)),               # answers to a question
            clip=Key(0.2, fraction()),               # how far from 1 a token's ratio counts
            value_clip=Key(0.2, at_least(0.0)),      # how far values move from those when the answer was written; 0: freely
            value_weight=Key(0.1, at_least(0.0)),    # of half the squared error of values
            discount=Key(1.0, between(0.0, 1.0)),    # of what comes a token later
            decay=Key(0.95, between(0.0, 1.0)),      # lambda of generalised advantages; 1: no bias, 0: least variance
        ),
    ),

    data=dict(
        source=Key('stdlib', name()),                # stdlib text jsonl fasta parquet hf_dataset arrayrecord; tokens:
        # nanogpt llmc megatron, made by data.tokenizer
        paths=Key('', text()),                       # files, as globs joined by commas; of stdlib 'train': those that its
        # tasks do not hold out
        text_field=Key('text', text()),              # of a JSON object; a table's column, of text or of token ids;
        # '': ArrayRecord's records are text themselves
        pair_field=Key('', text()),                  # of a JSON Lines object: the translation of its text; '': none
        split=Key('train', text()),                  # of a saved Hugging Face dataset that has several
        document=Key('file', choice('file', 'line', 'paragraph')),  # what a document is in a text file
        mixture=Key((), Check('a tuple of (name, source, paths, weight), weights whole and at least 1', lambda x: all(
            isinstance(m, tuple) and len(m) == 4 and all(isinstance(s, str) for s in m[:3])
            and type(m[3]) is int and m[3] >= 1 for m in x))),  # several sources instead of the one above
        phases=Key((), pairs(lambda n, w: is_scheduled(n, lambda _: isinstance(w, tuple) and integers(0).holds(w)
                                                       and sum(w) > 0), '(first example, weights)')),
        # other mixture weights from that example number on; an example's number is its step × batch_size
        temperature=Key(0.0, Check('0, or at least 0.1', lambda x: x == 0 or x >= 0.1)),  # weights times
        # (tokens to train on)^(1 / this), for mixtures of languages (XLM-R and mT5: 1 / 0.3); 0: weights as given
        tokenizer=Key('bytes', name()),              # bytes; bpe wordpiece unigram, trained here; or the path of a
        # tokenizer.json or a SentencePiece model
        vocab_size=Key(4096, at_least(260)),         # pieces of a tokenizer trained here
        tokenizer_bytes=Key(1 << 26, at_least(1)),   # text it is trained on, at most
        bos=Key(True, flag()),                       # a document starts with this token: its first one is predicted too
        eos=Key(True, flag()),                       # and ends with it
        store=Key('', text()),                       # folder of token stores; '': the user's cache folder
        holdout=Key(0.01, fraction()),               # of documents, by digest, never trained on
        packing=Key('concatenated', name()),         # concatenated best_fit contiguous padded
        task=Key('', text()),                        # what is learned in the place of raw text: a key of data/tasks.py,
        # the path of a JSON file that describes one, or "module:attribute"; '': raw text
        task_examples=Key(0, at_least(0)),           # of its training and its validation split, drawn by the seed; 0: all
        too_long=Key('refuse', choice('refuse', 'leave')),  # an example whose answer does not fit is an error, or left out
        template=Key('chatml', name()),              # of conversations: chatml gemma llama2 llama3 mistral, or a
        # Hugging Face folder that has one
        stride=Key(128, at_least(1)),                # tokens that windows of a long context share, where a span is sought
        mask_documents=Key(True, flag()),            # a token sees its own document only
        shuffle=Key(True, flag()),                   # a new order of documents every epoch
        workers=Key(0, between(0, 256)),             # processes that make batches; 0: a thread
        prefetch=Key(4, between(1, 1024)),           # batches made ahead
    ),

    loss=dict(
        z_loss=Key(0.0, at_least(0.0)),              # times log²Z, keeps logits small (PaLM: 1e-4)
        label_smoothing=Key(0.0, fraction()),        # of the target's probability, spread over the vocabulary
        chunk=Key(512, at_least(1)),                 # positions of a row whose logits exist at once
        class_weights=Key((), Check('a tuple of numbers above 0', lambda x: isinstance(x, tuple) and all(
            is_number(w) and w > 0 for w in x))),    # of tasks with labels: how much an example of each class counts
        teacher=dict(                                # distillation: what another model says of each target
            path=Key('', text()),                    # its run directory, or a Hugging Face folder; '': no teacher
            step=Key(0, at_least(0)),                # which checkpoint of the run; 0: the newest when training begins
            weight=Key(0.5, between(0.0, 1.0)),      # of its part of the loss; the targets' own gets the rest
            temperature=Key(1.0, above(0.0)),        # scores of both are divided by it
            top_k=Key(64, at_least(0)),              # it tells of so many of the likeliest tokens, and of all others
            # together; 0: of every token, an array of rows × columns × vocabulary
        ),
    ),

    optim=dict(
        name=Key('adamw', name()),                   # which of the sub-configs below, or "module:function"
        lr=Key(3e-4, above(0.0)),                    # peak
        layer_decay=Key(1.0, Check('above 0 and at most 1', lambda x: is_number(x) and 0 < x <= 1)),  # updates times this
        # for each layer above; embeddings move least (fine-tuning: 0.65 to 0.95)
        schedule=Key('cosine', name()),              # cosine wsd linear rsqrt constant, after the warmup
        warmup_steps=Key(0, at_least(0)),            # steps, linear from 0
        total_steps=Key(1_000, at_least(1), ref('steps')),  # steps over which the rate falls
        final_fraction=Key(0.1, between(0.0, 1.0)),  # of lr, at total_steps
        decay_fraction=Key(0.2, between(0.0, 1.0)),  # wsd: of total_steps, spent falling
        weight_decay=Key(0.1, at_least(0.0)),        # times the rate, times the parameter
        decay_rules=Key((('.*/(bias|scale)', 0.0), ('.*', 1.0)),
                        pairs(lambda p, m: isinstance(p, str) and is_number(m), '(pattern, multiple of weight_decay)')),
        lr_rules=Key((('.*', 1.0),),
                     pairs(lambda p, m: isinstance(p, str) and is_number(m), '(pattern, multiple of lr)')),
        freeze=Key((), texts()),                     # patterns of parameters that stay as they are
        clip_norm=Key(1.0, at_least(0.0)),           # of the whole gradient; 0: none
        ema_decay=Key(0.0, fraction()),              # moving average of parameters, used to evaluate; 0: none
        adamw=dict(b1=Key(0.9, fraction()), b2=Key(0.95, fraction()), eps=Key(1e-8, above(0.0))),
        adafactor=dict(decay_rate=Key(0.8, between(0.0, 1.0)), clipping=Key(1.0, above(0.0)),
                       min_dim=Key(128, at_least(1))),  # factored from this size on
        lion=dict(b1=Key(0.9, fraction()), b2=Key(0.99, fraction())),
        muon=dict(beta=Key(0.95, fraction()), ns_steps=Key(5, at_least(1)), adam_b1=Key(0.9, fraction()),
                  adam_b2=Key(0.95, fraction())),    # matrices; the rest by Adam
        sgd=dict(momentum=Key(0.9, fraction()), nesterov=Key(False, flag())),
        lamb=dict(b1=Key(0.9, fraction()), b2=Key(0.999, fraction()), eps=Key(1e-6, above(0.0))),
        lars=dict(momentum=Key(0.9, fraction()), trust=Key(0.001, above(0.0))),
        novograd=dict(b1=Key(0.9, fraction()), b2=Key(0.25, fraction()), eps=Key(1e-6, above(0.0))),
        adagrad=dict(initial=Key(0.1, at_least(0.0)), eps=Key(1e-7, above(0.0))),
        rmsprop=dict(decay=Key(0.9, fraction()), eps=Key(1e-8, above(0.0))),
    ),

    mesh={axis: Key(size, Check('at least 1, or -1 for what is left', lambda x: x >= 1 or x == -1))
          for axis, size in dict(replica=1, data=-1, fsdp=1, tensor=1, seq=1, pipe=1, expert=1).items()},

    sharding=dict(                                   # logical axis -> mesh axis, tuple of them, or None
        rules=Key((
            ('act_batch', ('replica', 'data', 'fsdp', 'expert')), ('act_length', 'seq'), ('act_stream', 'seq'),
            ('act_embed', None),
            ('act_heads', 'tensor'), ('act_mlp', 'tensor'), ('act_vocab', 'tensor'), ('act_vocab', 'pipe'),
            ('vocab', 'tensor'), ('vocab', 'pipe'), ('embed', 'fsdp'), ('mlp', 'tensor'), ('heads', 'tensor'),
            ('kv_heads', 'tensor'), ('head_dim', None), ('expert', 'expert'), ('layers', 'pipe'), ('mlp', 'fsdp'),
            ('head_dim', 'fsdp')),  # a second rule adds axes the array does not use: biases
            rules()),
        optimizer_rules=Key((), rules()),            # more of them, for what the optimizer keeps and for gradients:
        # (('embed', 'data'),) is ZeRO-1
        offload_optimizer=Key(False, flag()),        # the optimizer's state lies in the host's memory between updates
    ),

    pipeline=dict(                                   # of mesh.pipe stages
        microbatches=Key(0, at_least(0)),            # parts that a batch (or what accumulation leaves of it) is cut
        # into; 0: as many as there are stages
        repeats=Key(1, at_least(1)),                 # times each goes round all stages: 1 is GPipe's schedule
        remat=Key('layer', choice('layer', 'stage')),  # where model.remat computes again: inputs of every layer are
        # kept, or of a stage alone, all of whose layers' values exist then while it is; with repeats always the latter
    ),

    precision=dict(
        compute=Key('float32', choice('float32', 'bfloat16', 'float16')),  # of activations and matrix products
        params=Key('float32', choice('float32', 'bfloat16')),   # of the weights the optimizer keeps
        products=Key('compute', choice('compute', 'float8')),   # activations times weights in training, both directions:
        # as `compute`, or in 8 bits scaled by each tensor's largest; embeddings, logits, experts, attention stay as they are
    ),

    checkpoint=dict(
        keep_latest=Key(2, at_least(2)),             # newest ones kept; one may prove damaged, so two at least
        keep_every=Key(0, at_least(0)),              # also every so many steps, for good; 0: none
        keep_best=Key(0, at_least(0)),               # also the best by best_metric; 0: none
        best_metric=Key('eval/heldout/loss', name()),  # lower is better, unless
        best_is_highest=Key(False, flag()),
        patience=Key(0, at_least(0)),                # evaluations without a better one after which the run ends; 0: none
        resume=Key('', text()),                      # run to continue from, state and data position, in a new workdir
        init_from=Key('', text()),                   # run, or Hugging Face folder, whose weights this one starts with; of
        # model.peft, the base, which is read again whenever the run is
        init_step=Key(0, at_least(0)),               # its checkpoint; 0: the newest, and for a delta always that again
    ),

    eval=dict(
        batch_size=Key(32, at_least(1), ref('batch_size')),  # rows
        max_tokens=Key(1 << 20, at_least(1)),        # held-out text a source is measured on, whole documents;
        # of a task, the first examples of its validation split
        prompts=Key(('',), texts()),                 # what samples.jsonl continues; none: no samples
        sample_tokens=Key(64, at_least(1)),          # length of a sample
        temperature=Key(0.8, at_least(0.0)),         # of samples; 0: greedy
        by_context=Key(False, flag()),               # also the loss by how many tokens stand before the target
    ),
)
