"""The embedded world: a small generated encyclopedia, its questions and their ranked contexts.

    python toy/world.py --out toy/data     # corpus.tsv; of train, dev and test: .json, queries, qrels; two seconds

People and towns have names of two parts drawn from shared lists, so that every entity has look-alikes. A quarter of
all names (`is_held_out`) occurs only in dev and test questions and their passages: no answer can be memorised. Questions
ask in other words than the passages state, and the questions' words occur in passages that state something else, so
that word overlap alone misleads. "Which hobby do A and B share?" needs one passage about each. Everything follows from
the seed.
"""
import argparse
import json
import math
import random
import re
import zlib
from collections import Counter, defaultdict
from pathlib import Path

FIRST = """Adela Bram Corin Dorte Edda Falk Greta Hanno Ilse Joren Kaia Lorin Mirel Nadja Orla Perrin Quill Rosa Sven
Talia Ulric Vesna Wilma Xenia Yorick Zelda Anselm Berit Cosmo Dagny Emil Flora Gideon Hedda Ivo Jutta Klaus Liv Magnus
Nils Oda Piet""".split()
LAST = """Abernath Brenwick Calder Dunmore Eastley Fenwick Garrow Holm Ingleby Jessop Kestrel Lund Marlow Norwood Oakes
Pryor Quarles Rusk Selwyn Thorne Underhill Vance Wexford Yarrow Zeller Ashdown Birch Corbett Drummond Ellery Farrow
Gorse Hartwell Ives Jarrow Kirk Linden Moss Nettle Osgood Penrose Redfern Stroud Tarn Upton Vesper Whitlock
Yates""".split()
TOWN_FIRST = "Upper Nether Old Little Great North South East West Royal Stony Green High Low Far Dry".split()
TOWN_LAST = """Kelmoor Brask Tolvan Merrow Ostby Culver Dravik Ensham Folden Grimsey Harrowgate Istrad Jorvale Kesby
Lanmere Mostyn Narvik Orlebar Pellan Querne Rothby Sarnau Tresk Ulmar Vintry Wolden Yelland Zarnow Ardale Belford Corve
Dunster""".split()
TRADE = """baker cooper glazier tailor weaver potter mason tanner saddler brewer miller printer cobbler hatter joiner
locksmith apothecary barber ferryman clockmaker gardener chandler thatcher furrier""".split()
ANIMAL = """otter falcon goat hound raven badger donkey goose ferret heron lynx marten owl pony rabbit stork swan
tortoise weasel crane fox hedgehog magpie ram""".split()
HOBBY = """archery chess juggling dancing fishing fencing rowing carving pottery knitting painting singing skating
whistling cooking poetry falconry wrestling gambling astronomy beekeeping sketching climbing riding""".split()
RIVER = """Arrow Blythe Cam Deben Esk Flit Gade Hull Isla Kennet Lark Mole Nene Ouse Parrett Rother Severn Tamar Usk
Waveney Yare Wye Teme Lune""".split()
GOODS = """salt wool honey paper glass candles rope cheese cider bells lace nails leather ink soap timber amber barrels
copper linen mustard pewter sails slate""".split()

# relation: (statements, questions). {n} the entity, {v} the value, {w} the second value of a hobby.
PERSON = {
    "birthplace": (("{n} came into the world at {v}", "the cradle of {n} stood in {v}", "{n} first saw daylight in {v}"),
                   ("Where was {n} born?", "What is the birthplace of {n}?", "In which town was {n} born?")),
    "home": (("{n} settled in {v} for good", "the house of {n} was in {v}", "{n} grew old in {v}"),
             ("Where did {n} live?", "In which town did {n} make a home?", "What was the residence of {n}?")),
    "trade": (("{n} earned bread as a {v}", "all the quarter went to {n} for a {v}", "{n} worked forty years as a {v}"),
              ("What was the profession of {n}?", "What did {n} do for a living?", "Which job did {n} have?")),
    "teacher": (("{n} learned the profession from {v}", "the one who made {n} ready for a living was {v}",
                 "{n} was for seven years apprentice to {v}"),
                ("Who taught {n}?", "Who was the teacher of {n}?", "By whom was {n} trained?")),
    "animal": (("a {v} born in the yard followed {n} about", "{n} trained a {v} to walk to heel",
                "{n} shared a roof with a {v}"),
               ("Which pet did {n} keep?", "What kind of creature did {n} own?", "What animal lived with {n}?")),
    "hobby": (("{n} filled the evenings with {v} and {w}", "{v} and {w} were the joys of {n}",
               "nobody in town matched {n} at {v} or {w}"),
              ("What was a hobby of {n}?", "What did {n} do as a pastime?", "Name a hobby that {n} had.")),
}
TOWN = {
    "river": (("{n} looks down on the {v}", "the {v} turns the mills of {n}", "the {v} floods the meadows below {n}"),
              ("Which river runs past {n}?", "On what river does {n} lie?", "What water flows by {n}?")),
    "goods": (("carts of {v} leave {n} each autumn", "{n} owes its wealth to {v}", "pedlars know {n} for its {v}"),
              ("What is made in {n}?", "Which product is {n} known for?", "What does {n} sell?")),
    "mayor": (("{v} carries the keys of {n}", "the people of {n} bow to {v}", "the seal of {n} lies with {v}"),
              ("Who is the mayor of {n}?", "Who governs {n}?", "Who rules over {n}?")),
    "emblem": (("a {v} is carved over the gate of {n}", "the banner of {n} shows a {v}", "{n} stamps a {v} on its coins"),
               ("Which animal is the emblem of {n}?", "What creature stands for {n}?", "What is the symbol of {n}?")),
}
SHARED = ("Which hobby do {n} and {m} share?", "What pastime is common to {n} and {m}?",
          "Which hobby did both {n} and {m} have?")
ASIDES = ("a letter to {o} names the town, the river and the profession", "{o} asked where the pet was born",
          "the living and the residence of {o} are told elsewhere", "a song on the mayor and the animal is by {o}",
          "{o} wrote of the hobby and the job", "a home, a product and a teacher are all that {o} left out")


def is_held_out(name):
    """True for the quarter of all names that only dev and test questions may ask about."""
    return zlib.crc32(name.encode()) % 4 == 0


def draw_names(rng, first, last, count, held_out):
    """`count` distinct two-part names, all of them held out or none."""
    names = [f"{a} {b}" for a in first for b in last if is_held_out(f"{a} {b}") == held_out]
    return rng.sample(names, count)


def make_entities(rng, num_people, num_towns, held_out):
    """Entities as {name, kind, facts: {relation: value}}; a hobby's value is a pair."""
    people = draw_names(rng, FIRST, LAST, num_people, held_out)
    towns = draw_names(rng, TOWN_FIRST, TOWN_LAST, num_towns, held_out)
    entities = []
    for name in people:
        facts = {"birthplace": rng.choice(towns), "home": rng.choice(towns), "trade": rng.choice(TRADE),
                 "teacher": rng.choice([p for p in people if p != name]), "animal": rng.choice(ANIMAL),
                 "hobby": rng.sample(HOBBY, 2)}
        entities.append({"name": name, "kind": PERSON, "facts": facts})
    for name in towns:
        facts = {"river": rng.choice(RIVER), "goods": rng.choice(GOODS), "mayor": rng.choice(people),
                 "emblem": rng.choice(ANIMAL)}
        entities.append({"name": name, "kind": TOWN, "facts": facts})
    return entities, people


def punctuate(sentence):
    """Capital, full stop, and 'an' before a vowel."""
    return re.sub(r"\b(a) (?=[aeiou])", r"\1n ", sentence[0].upper() + sentence[1:] + ".", flags=re.I)


def write_passages(rng, entity, people):
    """Two passages: each states half of the facts, names the entity in full once and carries one misleading aside."""
    relations = rng.sample(list(entity["facts"]), len(entity["facts"]))
    half, passages = len(relations) // 2, []
    for part in (relations[:half], relations[half:]):
        sentences, called = [], entity["name"]
        for relation in part:
            value = entity["facts"][relation]
            v, w = value if relation == "hobby" else (value, None)
            sentences.append((relation, rng.choice(entity["kind"][relation][0]).format(n=called, v=v, w=w)))
            called = entity["name"].split()[1]
        aside = rng.choice(ASIDES).format(o=rng.choice([p for p in people if p != entity["name"]]))
        sentences.insert(rng.randrange(1, len(sentences) + 1), (None, aside))
        sentences = [(relation, punctuate(text)) for relation, text in sentences]
        passages.append({"title": entity["name"], "text": " ".join(text for _, text in sentences), "relations": part,
                         "sentences": sentences})
    return passages


def ask(rng, entity, relation):
    """(question, gold answers) for one fact."""
    value = entity["facts"][relation]
    return rng.choice(entity["kind"][relation][1]).format(n=entity["name"]), list(value) if relation == "hobby" else [value]


def ask_shared(rng, entities):
    """(question, gold answers, the two entities) for two people with exactly one hobby in common."""
    people = [e for e in entities if e["kind"] is PERSON]
    while True:
        a, b = rng.sample(people, 2)
        both = set(a["facts"]["hobby"]) & set(b["facts"]["hobby"])
        if len(both) == 1:
            return rng.choice(SHARED).format(n=a["name"], m=b["name"]), list(both), (a, b)


class OverlapRanker:
    """Ranks passages by the summed inverse document frequency of the words they share with the question, blurred."""

    def __init__(self, passages, blur):
        self.passages, self.blur = passages, blur
        self.postings = defaultdict(list)
        for place, p in enumerate(passages):
            for word, count in self.words(p["title"] + " " + p["text"]).items():
                self.postings[word].append((place, count / (count + 1)))

    @staticmethod
    def words(text):
        return Counter(re.findall(r"\w+", text.lower()))

    def rank(self, rng, question, top_k):
        scores = Counter()
        for word in self.words(question):
            for place, weight in self.postings[word]:
                scores[place] += weight * math.log(len(self.passages) / len(self.postings[word]))
        scores = {place: score * math.exp(rng.gauss(0, self.blur)) for place, score in scores.items()}
        best = sorted(scores, key=lambda place: (-scores[place], place))[:top_k]
        return [{**{k: self.passages[p][k] for k in ("id", "title", "text")}, "score": round(scores[p], 4)} for p in best]


def make_records(rng, split, entities, ranker, count, top_k=20, shared=0.15):
    """`count` question records of one split, `shared` of them needing two passages."""
    facts = [(e, r) for e in entities for r in e["facts"]]
    singles = rng.sample(facts, round(count * (1 - shared)))
    asked = [(*ask(rng, e, r), [(e["name"], r)]) for e, r in singles]
    for _ in range(count - len(asked)):
        question, answers, pair = ask_shared(rng, entities)
        asked.append((question, answers, [(e["name"], "hobby") for e in pair]))
    rng.shuffle(asked)
    records = []
    for i, (question, answers, needed) in enumerate(asked):
        gold = {p["id"] for p in ranker.passages for n, r in needed if p["title"] == n and r in p["relations"]}
        ctxs = ranker.rank(rng, question, top_k)
        for c in ctxs:
            c["has_answer"] = c["id"] in gold
        records.append({"id": f"{split}-{i}", "question": question, "answers": answers, "gold": sorted(gold), "ctxs": ctxs})
    return records


def make_demo(seed=1):
    """The demo's corpus and splits: (passages, {train, dev, test})."""
    rng = random.Random(seed)
    seen, seen_people = make_entities(rng, 300, 80, held_out=False)
    unseen, unseen_people = make_entities(rng, 210, 60, held_out=True)
    passages = [p for e in seen for p in write_passages(rng, e, seen_people)]
    num_seen = len(passages)
    passages += [p for e in unseen for p in write_passages(rng, e, unseen_people)]
    for i, p in enumerate(passages):
        p["id"] = str(i + 1)
    train_ranker, test_ranker = OverlapRanker(passages[:num_seen], 0.08), OverlapRanker(passages, 0.08)
    rng.shuffle(unseen)
    return passages, {"train": make_records(rng, "train", seen, train_ranker, 2000),
                      "dev": make_records(rng, "dev", unseen[:90], test_ranker, 300),
                      "test": make_records(rng, "test", unseen[90:], test_ranker, 600)}


def write_qrels(out, split, records):
    """The same questions as BEIR has them: queries, qrels and, mined by word overlap, passages that do not answer (score 0)."""
    queries = [json.dumps({"_id": r["id"], "text": r["question"]}) for r in records]
    (out / f"queries.{split}.jsonl").write_text("\n".join(queries) + "\n")
    gold = [f"{r['id']}\t{id}\t1" for r in records for id in r["gold"]]
    mined = [f"{r['id']}\t{c['id']}\t0" for r in records for c in r["ctxs"] if not c["has_answer"]]
    for name, rows in (("qrels", gold), ("mined", mined)):
        (out / f"{name}.{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore"] + rows) + "\n")


def main(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    passages, splits = make_demo(args.seed)
    rows = ["id\ttext\ttitle"] + [f"{p['id']}\t{p['text']}\t{p['title']}" for p in passages]
    (out / "corpus.tsv").write_text("\n".join(rows) + "\n")
    for split, records in splits.items():
        (out / f"{split}.json").write_text(json.dumps(records, indent=1))
        recall = [sum(any(c["has_answer"] for c in r["ctxs"][:k]) for r in records) / len(records) for k in (1, 2, 5, 10)]
        write_qrels(out, split, records)
        print(f"{split:5s} {len(records)} questions, gold passage among the first 1, 2, 5, 10: "
              + ", ".join(f"{100 * x:.0f} %" for x in recall))
    print(f"corpus {len(passages)} passages, for example: {passages[0]['title']}: {passages[0]['text']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="toy/data", help="folder to write to (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the world (default: %(default)s)")
    main(parser.parse_args())
