"""Learns a byte-pair vocabulary from the training part of a text, as a file of the `tokenizers` library.

    python -m train.vocabulary vocabulary.json --data stdlib --size 2048
    python -m train --config configs/text.py:yaad_nano --config.data.tokenizer=vocabulary.json

It begins with the 256 bytes, so that no UTF-8 text is lost. The same text gives the same file. The vocabulary that is
called "python" was made by the first of these lines.
"""

import sys
from collections.abc import Iterator, Sequence

from etils import epath

from train import commands, evaluate, text
from zoo.sequence.tokenizers import import_library

BYTES = 256


def learn(documents: text.Documents, size: int) -> str:
    """A byte-pair vocabulary of a text.

    Words are split as GPT-2 splits them, so that runs of spaces and of line ends are tokens too.

    Args:
        documents: of UTF-8.
        size: how many tokens at most, the 256 bytes included; a short text gives fewer.

    Returns:
        The content of a `.json` file that `zoo.sequence.tokenizers.open_tokenizer` reads.

    Raises:
        ValueError: a size below 256, a document that is not UTF-8.
        ImportError: the library `tokenizers` is not installed; it says how to install it.
    """
    if size < BYTES:
        raise ValueError(f"size must be at least {BYTES}, the number of bytes, got {size}")
    library = import_library("tokenizers", "learning a vocabulary")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_characters(documents), trainer)
    return tokenizer.to_str(pretty=False)


def _characters(documents: text.Documents) -> Iterator[str]:
    for name, content in zip(documents.names, documents.texts):
        try:
            yield content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} of the {documents.name}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None means those of the process.

    Returns:
        The exit code: 0 done, 2 the arguments or the data are wrong.
    """
    parser = commands.parser("train.vocabulary", __doc__)
    parser.add_argument("file", metavar="FILE.json", help="to write")
    parser.add_argument("--data", default="stdlib", metavar="NAME", help="as data.name of a config (%(default)s)")
    parser.add_argument("--path", metavar="PATH", help="as data.path of a config")
    parser.add_argument("--size", type=int, default=2048, help="tokens (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.file.endswith(".json"):
            raise ValueError(f"FILE must end in .json, as files of the library `tokenizers` do, got {arguments.file!r}")
        documents = text.open_documents(arguments.data, split="train", path=arguments.path)
        epath.Path(arguments.file).write_text(learn(documents, arguments.size))
    except evaluate.ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.file}: learnt from {documents.detail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
