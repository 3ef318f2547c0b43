"""What is known of the licences of models and texts, by their names on the Hugging Face Hub.

Their publishers decide and may change them, so that cards say where to look, too. Names that no rule
matches are not guessed at.
"""

import re

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

# Name on the Hub -> licence, as the publisher's page names it.
MODELS = {
    r"EleutherAI/pythia-.+": "Apache-2.0",
    r"(openai-community/)?gpt2(-medium|-large|-xl)?": "MIT",
    r"google/gemma-(\d+b|2-\d+b|3-\d+m|3-\d+b)(-\w+)?": "Gemma Terms of Use",
    r"meta-llama/Llama-2-.+": "Llama 2 Community License",
    r"meta-llama/Meta-Llama-3-.+": "Llama 3 Community License",
    r"meta-llama/(Meta-)?Llama-3\.1-.+": "Llama 3.1 Community License",
    r"meta-llama/Llama-3\.2-.+": "Llama 3.2 Community License",
    r"meta-llama/Llama-3\.3-.+": "Llama 3.3 Community License",
    r"Qwen/Qwen2\.5-(0\.5|1\.5|7|14|32)B(-\w+)?": "Apache-2.0",
    r"Qwen/Qwen3-.+": "Apache-2.0",
}
_OF_PAGES = "the texts belong to their authors, and Common Crawl's Terms of Use apply"
_OF_SOURCES = "a collection from many sources, whose texts stay under the terms of those"
TEXTS = {
    r"(monology/pile-uncopyrighted|EleutherAI/(the_)?pile\w*)": _OF_SOURCES,
    r"Skylion007/openwebtext": "CC0-1.0 for the collection; the texts belong to their authors",
    r"(HuggingFaceFW/fineweb(-edu)?|allenai/c4)": f"ODC-By 1.0 for the collection; {_OF_PAGES}",
    r"(Salesforce/)?wikitext": "CC BY-SA 3.0 and GFDL",
    r"roneneldan/TinyStories": "CDLA-Sharing-1.0",
}


def is_identifier(licence: str) -> bool:
    """Whether it is spelt like a licence's identifier on the Hub, such as apache-2.0."""
    return _IDENTIFIER.fullmatch(licence) is not None


def of_model(name: str) -> str | None:
    """The licence of a model by its name on the Hub; None where it is not known."""
    return _known(MODELS, name)


def of_text(name: str) -> str | None:
    """The same of a data set, OWNER/NAME or OWNER/NAME:SUBSET."""
    return _known(TEXTS, name.partition(":")[0])


def _known(rules: dict[str, str], name: str) -> str | None:
    return next((licence for rule, licence in rules.items() if re.fullmatch(rule, name)), None)
