"""Encoding of documents, with bos, eos and the loss mask of conversations."""

from pathlib import Path

import numpy as np

from corpus.chat import ChatEncoder, read_template
from corpus.config import CorpusConfig, Style, TokenizerConfig
from corpus.documents import Document
from corpus.left_out import LeftOut
from data.shards import LOSS_MASKED
from data.tokenizer import Tokenizer, encode_documents, load_tokenizer


class DocumentEncoder:
    """Encodes documents with the tokenizer in a folder."""

    def __init__(self, data: CorpusConfig, config: TokenizerConfig, folder: Path) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.bos = self.tokenizer.bos_id if config.add_bos else None
        self.eos = self.tokenizer.eos_id if config.add_eos else None
        self.special = config.special_tokens_in_text
        self.chat = self.token_bytes = None
        if data.style is not Style.text:
            self.chat = ChatEncoder(read_template(data.chat_template), self.tokenizer)
            self.token_bytes = self.tokenizer.token_bytes()

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        return np.uint16 if self.chat is None and self.tokenizer.vocab_size <= 1 << 16 else np.uint32

    def encode(self, documents: list[Document], left_out: LeftOut) -> list[tuple[Document, np.ndarray]]:
        """Return the documents and their ids, uint32, with the loss mask in the highest bit.

        Sets `text_bytes` of conversations to the size of the rendered text.
        """
        if self.chat is None or self.token_bytes is None:
            texts, bos, eos = [document.text for document in documents], self.bos is not None, self.eos is not None
            ids = encode_documents(self.tokenizer, texts, add_bos=bos, add_eos=eos, special=self.special)
            return list(zip(documents, ids, strict=True))
        found = []
        for document in documents:
            messages = document.messages or []
            try:
                self.chat.check_written(messages)
                ids_T, mask_T = self.chat.encode(messages)
            except ValueError as error:
                left_out.bad(document.place, str(error))
                continue
            if self.bos is not None and ids_T[0] != self.bos:  # unless the template has written it
                ids_T, mask_T = np.insert(ids_T, 0, self.bos), np.insert(mask_T, 0, False)
            if self.eos is not None and ids_T[-1] != self.eos:
                ids_T, mask_T = np.append(ids_T, self.eos), np.append(mask_T, True)
            document.text_bytes = int(self.token_bytes[ids_T].sum())
            found.append((document, np.where(mask_T, ids_T, ids_T | np.uint32(LOSS_MASKED)).astype(np.uint32)))
        return found
