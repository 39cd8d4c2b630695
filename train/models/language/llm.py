"""The LLM: Megatron-core's GPTModel with RMSNorm, GQA, SwiGLU and a Mixture of Experts, fed with visual rows.

Its embedding output takes rows that come from the encoder at the places of visual tokens, its rotary positions come
from the row's own position table, in any context-parallel split, and its loss comes straight from the last hidden
states.  What its layers are made of is `llm_spec.py`.

Legend: S tokens of a micro-batch on this cp rank, U visual rows on this rank.
"""

from dataclasses import replace

from megatron.core.models.gpt.gpt_model import GPTModel

from tandem.parallel.comm.context import PackedRow
from tandem.parallel.kernels.cross_entropy import linear_cross_entropy
from tandem.train.models.language.rope import Rope


class VisualGPT(GPTModel):
    """GPTModel whose embedding output takes visual rows at given places, and whose loss never has a row's logits.

    words: rows of the vocabulary that there are; what pads it to a multiple of tp is zero, gets no gradient, no logit
    and no place in a checkpoint.
    """

    def __init__(self, *args, rope: Rope, words: int, **kwargs):
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.rope, self.words = rope, words

    def setup_embeddings_and_output_layer(self) -> None:
        """Marks the first and the last stage's copy of a tied embedding.

        Megatron-core would fill one copy from the other: here every weight is filled by its name
        (`parallel.engines.llm_shards`), which both share.
        """
        if not self.share_embeddings_and_output_weights:
            super().setup_embeddings_and_output_layer()
        elif self.pre_process is not self.post_process:
            copy = self.shared_embedding_or_output_weight()
            copy.shared_embedding = True  # its gradient is summed over both stages, in a bucket of its own
            copy.shared = self.post_process  # not in the norm once more, nor in a checkpoint

    def forward(self, tokens_1S, labels_1S, row: PackedRow, visual_UD=None, at_U=None):
        """Per-token loss [1, S] on the last stage (without labels, logits of all words); hidden states on the others.

        visual_UD: rows for this rank's slice of the sequence, at_U their local places; both None past the first stage.
        """
        row = replace(row, tables_2SK=self.rope.tables(row.positions_S))
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids=tokens_1S, position_ids=None)  # [S / tp, 1, D]
            embedded = embedded.index_copy(0, at_U, visual_UD.to(embedded.dtype)[:, None])
        return super().forward(
            input_ids=tokens_1S,
            position_ids=None,
            attention_mask=None,
            decoder_input=embedded,
            labels=labels_1S,
            packed_seq_params=row,
            runtime_gather_output=labels_1S is None,
        )

    def _postprocess(self, hidden_states, labels, **others):
        """The loss in place of Megatron-core's, which makes all logits first."""
        if not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **others)
        if labels is None:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **others)[..., : self.words]
        tied = self.share_embeddings_and_output_weights
        losses_S = linear_cross_entropy(
            hidden_states[:, 0],
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels[0],
            self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
            words=self.words,
        )
        return losses_S[None]
