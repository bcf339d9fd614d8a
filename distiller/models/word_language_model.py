"""The LSTM word-language model of PyTorch's examples, with the names its pruning schedules use.

Not an image classifier, so not among the names of `create_model`: build it by its class.
Knows nothing about text, vocabularies or training.
"""

from __future__ import annotations

from torch import Tensor, nn

from distiller.errors import UsageError

Hidden = tuple[Tensor, Tensor]


class RNNModel(nn.Module):
    """`encoder`: an embedding; `rnn`: an LSTM; `decoder`: a linear layer over the vocabulary.

    The weights of the LSTM are `rnn.weight_ih_l0`, `rnn.weight_hh_l0` and so on, a pair a layer.
    When tied, `encoder.weight` is the decoder's weight too, and its one name.

    Args:
        ntoken: number of words in the vocabulary.
        emsize: size of a word's embedding; default 200.
        nhid: number of hidden units of a layer; default 200.
        nlayers: number of LSTM layers; default 2.
        dropout: share of the embeddings and of each layer's outputs dropped in training, 0..1;
            default 0.2.
        tied: whether the embedding's weight is the decoder's too; needs `emsize` equal to `nhid`.

    Raises:
        UsageError: tied, with `emsize` other than `nhid`.

    Source: Zaremba et al., "Recurrent Neural Network Regularization", 2014; tied weights: Press &
    Wolf, "Using the Output Embedding to Improve Language Models", 2016.
    """

    def __init__(
        self,
        ntoken: int,
        emsize: int = 200,
        nhid: int = 200,
        nlayers: int = 2,
        dropout: float = 0.2,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if tied and emsize != nhid:
            raise UsageError(
                f"RNNModel: tied weights need emsize equal to nhid, got {emsize} and {nhid}; "
                "make them equal or leave tied out"
            )
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, emsize)
        # PyTorch warns of a dropout that is between no layers.
        self.rnn = nn.LSTM(emsize, nhid, nlayers, dropout=dropout if nlayers > 1 else 0.0)
        self.decoder = nn.Linear(nhid, ntoken)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, input: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """Scores of the next word after each word.

        Args:
            input: word indices, (steps, batch).
            hidden: what `init_hidden` or the call before gave.

        Returns:
            (logits of shape (steps, batch, ntoken), hidden after the last step).
        """
        embedded = self.drop(self.encoder(input))  # (steps, batch, emsize)
        output, hidden = self.rnn(embedded, hidden)  # (steps, batch, nhid)
        return self.decoder(self.drop(output)), hidden

    def init_hidden(self, batch: int) -> Hidden:
        """Zeros for hidden and cell state, each (nlayers, batch, nhid), on the weights' device."""
        shape = (self.rnn.num_layers, batch, self.rnn.hidden_size)
        return self.decoder.weight.new_zeros(shape), self.decoder.weight.new_zeros(shape)
