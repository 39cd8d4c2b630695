from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tandem.data.planning.corpus import Corpus, SourceSettings
from tests.data.synthetic import MemoryCatalog, MemoryShard, Sample, corpus_of


def shards(*domains):
    return [MemoryShard.of([Sample(9, domain=domain), Sample(9, domain="all")]) for domain in domains]


def test_shards_are_numbered_over_the_sources():
    corpus = corpus_of(shards("x", "y"), shards("z"), shards("x", "w", "v"))
    assert corpus.n_shards == 6 and [source.first_shard for source in corpus.sources] == [0, 2, 3]
    assert [int(corpus.source_of(shard)) for shard in range(6)] == [0, 0, 1, 2, 2, 2]
    assert corpus.source_of(np.array([5, 0, 2])).tolist() == [2, 0, 1]
    assert [corpus.shard_name(shard) for shard in (1, 2, 4)] == [f"memory-{k:04}.tar" for k in (1, 0, 1)]
    assert corpus.index(4) is corpus.sources[2].catalog.shards[1]


def test_domains_are_one_list_over_the_sources():
    corpus = corpus_of(shards("x", "y"), shards("z"), shards("x", "w", "v"))
    assert corpus.domains == ("all", "v", "w", "x", "y", "z")
    for shard, own in enumerate("xyzxwv"):
        domains = corpus.group_domains(shard)
        assert [corpus.domains[d] for d in domains] == [own, "all"] and domains.dtype == np.int16


def test_few_indexes_stay_open_and_threads_may_share_them(monkeypatch):
    monkeypatch.setattr("tandem.data.planning.corpus.CACHED_INDEXES", 2)
    corpus = corpus_of(shards(*"abcdef"))
    with ThreadPoolExecutor(4) as pool:
        wanted = np.random.default_rng(0).integers(0, 6, 200).tolist()
        found = list(pool.map(corpus.index, wanted))
    catalog = corpus.sources[0].catalog
    assert all(index is catalog.shards[shard] for index, shard in zip(found, wanted, strict=True))
    assert len(corpus._indexes) == 2
    corpus.index(5)
    before = catalog.opened[5]
    corpus.index(5)
    assert catalog.opened[5] == before


def settings(**changes):
    return SourceSettings(**{"name": "web", "shards": ("a.tar",), **changes})


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"shards": ()}, "data.sources.web.shards is empty"),
        ({"weight": 0.0}, "data.sources.web.weight=0.0: must be a number above 0"),
        ({"repeat": -1}, "data.sources.web.repeat=-1: must be a number above 0"),
        ({"fps": float("inf")}, "data.sources.web.fps=inf: must be a number above 0"),
        ({"max_samples": 0}, "data.sources.web.max_samples=0: must be a whole number, at least 1"),
        ({"entity_cap": 0}, "data.sources.web.entity_cap=0: must be a whole number"),
        ({"rare_domain_copies": 1.5}, "data.sources.web.rare_domain_copies=1.5: must be a whole number"),
        ({"weight": 1, "repeat": 2}, "data.sources.web has weight=1 and repeat=2"),
        ({"weight": 1, "max_samples": 9}, "data.sources.web has weight=1 and max_samples=9"),
        ({"train_roles": ("robot",)}, r"data.sources.web.train_roles=\['robot'\]: choose some of"),
        ({"train_roles": ()}, r"data.sources.web.train_roles=\[\]: choose some of"),
    ],
)
def test_impossible_settings_name_their_key(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings(**changes)


def test_impossible_corpora(monkeypatch):
    with pytest.raises(ValueError, match="data.sources is empty"):
        Corpus([], [], "tokenizer")
    catalog = MemoryCatalog(shards("x"))
    with pytest.raises(ValueError, match="names a source twice"):
        Corpus([settings(), settings()], [catalog] * 2, "tokenizer")
    with pytest.raises(ValueError, match="web has no weight, but others have"):
        Corpus([settings(), settings(name="b", weight=2)], [catalog] * 2, "tokenizer")
    with pytest.raises(ValueError, match="data.sources.web: its 1 shards hold no usable sample"):
        Corpus([settings()], [MemoryCatalog([MemoryShard.of([])])], "tokenizer")
    monkeypatch.setattr("tandem.data.planning.corpus.MAX_DOMAINS", 3)
    with pytest.raises(ValueError, match="4 domains; at most 3"):
        Corpus([settings()], [MemoryCatalog(shards("x", "y", "z"))], "tokenizer")
