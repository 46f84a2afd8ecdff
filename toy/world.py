"""Generate the embedded world: a small encyclopedia, questions, and their ranked contexts.

    python toy/world.py --out toy/data             # two seconds
    python toy/world.py --out toy/hard --hard      # the world of make demo-loop

Written: corpus.tsv and, for each of train, dev and test, the reader's records (SPLIT.json) and the
retriever's queries, qrels and mined negatives. With --hard, SPLIT.json has only questions and
answers, and retrieve.py has to find contexts and negatives. gold.SPLIT.json then has the gold
passages as contexts, labelled.json those of the training questions as positives.

People and towns have names of two parts drawn from shared lists, so that every entity has
look-alikes. A quarter of all names (`is_held_out`) occurs only in dev and test questions and their
passages: no answer can be memorised. Questions use other words than the passages that answer them,
and their words occur in passages about something else, so that word overlap alone misleads. "Which
hobby do A and B share?" needs one passage about each. The seed determines everything.
"""
import argparse
import json
import math
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from records.files import new_file
from utils import run_script

FIRST = """
Adela Bram Corin Dorte Edda Falk Greta Hanno Ilse Joren Kaia Lorin Mirel Nadja Orla Perrin
Quill Rosa Sven Talia Ulric Vesna Wilma Xenia Yorick Zelda Anselm Berit Cosmo Dagny Emil
Flora Gideon Hedda Ivo Jutta Klaus Liv Magnus Nils Oda Piet
""".split()
LAST = """
Abernath Brenwick Calder Dunmore Eastley Fenwick Garrow Holm Ingleby Jessop Kestrel Lund
Marlow Norwood Oakes Pryor Quarles Rusk Selwyn Thorne Underhill Vance Wexford Yarrow Zeller
Ashdown Birch Corbett Drummond Ellery Farrow Gorse Hartwell Ives Jarrow Kirk Linden Moss
Nettle Osgood Penrose Redfern Stroud Tarn Upton Vesper Whitlock Yates
""".split()
TOWN_FIRST = """
Upper Nether Old Little Great North South East West Royal Stony Green High Low Far Dry
""".split()
TOWN_LAST = """
Kelmoor Brask Tolvan Merrow Ostby Culver Dravik Ensham Folden Grimsey Harrowgate Istrad
Jorvale Kesby Lanmere Mostyn Narvik Orlebar Pellan Querne Rothby Sarnau Tresk Ulmar Vintry
Wolden Yelland Zarnow Ardale Belford Corve Dunster
""".split()
TRADE = """
baker cooper glazier tailor weaver potter mason tanner saddler brewer miller printer cobbler
hatter joiner locksmith apothecary barber ferryman clockmaker gardener chandler thatcher
furrier
""".split()
ANIMAL = """
otter falcon goat hound raven badger donkey goose ferret heron lynx marten owl pony rabbit
stork swan tortoise weasel crane fox hedgehog magpie ram
""".split()
HOBBY = """
archery chess juggling dancing fishing fencing rowing carving pottery knitting painting
singing skating whistling cooking poetry falconry wrestling gambling astronomy beekeeping
sketching climbing riding
""".split()
RIVER = """
Arrow Blythe Cam Deben Esk Flit Gade Hull Isla Kennet Lark Mole Nene Ouse Parrett Rother
Severn Tamar Usk Waveney Yare Wye Teme Lune
""".split()
GOODS = """
salt wool honey paper glass candles rope cheese cider bells lace nails leather ink soap
timber amber barrels copper linen mustard pewter sails slate
""".split()


class Relation(NamedTuple):
    """Hold the sentences that state a fact and the questions that ask for it.

    {n} is the entity, {v} the value, {w} the second value of a hobby.
    """
    statements: tuple
    questions: tuple


PERSON = {
    "birthplace": Relation(
        ("{n} came into the world at {v}", "the cradle of {n} stood in {v}",
         "{n} first saw daylight in {v}"),
        ("Where was {n} born?", "What is the birthplace of {n}?", "In which town was {n} born?")),
    "home": Relation(
        ("{n} settled in {v} for good", "the house of {n} was in {v}", "{n} grew old in {v}"),
        ("Where did {n} live?", "In which town did {n} make a home?",
         "What was the residence of {n}?")),
    "trade": Relation(
        ("{n} earned bread as a {v}", "all the quarter went to {n} for a {v}",
         "{n} worked forty years as a {v}"),
        ("What was the profession of {n}?", "What did {n} do for a living?",
         "Which job did {n} have?")),
    "teacher": Relation(
        ("{n} learned the profession from {v}", "the one who made {n} ready for a living was {v}",
         "{n} was for seven years apprentice to {v}"),
        ("Who taught {n}?", "Who was the teacher of {n}?", "By whom was {n} trained?")),
    "animal": Relation(
        ("a {v} born in the yard followed {n} about", "{n} trained a {v} to walk to heel",
         "{n} shared a roof with a {v}"),
        ("Which pet did {n} keep?", "What kind of creature did {n} own?",
         "What animal lived with {n}?")),
    "hobby": Relation(
        ("{n} filled the evenings with {v} and {w}", "{v} and {w} were the joys of {n}",
         "nobody in town matched {n} at {v} or {w}"),
        ("What was a hobby of {n}?", "What did {n} do as a pastime?",
         "Name a hobby that {n} had.")),
}
TOWN = {
    "river": Relation(
        ("{n} looks down on the {v}", "the {v} turns the mills of {n}",
         "the {v} floods the meadows below {n}"),
        ("Which river runs past {n}?", "On what river does {n} lie?",
         "What water flows by {n}?")),
    "goods": Relation(
        ("carts of {v} leave {n} each autumn", "{n} owes its wealth to {v}",
         "pedlars know {n} for its {v}"),
        ("What is made in {n}?", "Which product is {n} known for?", "What does {n} sell?")),
    "mayor": Relation(
        ("{v} carries the keys of {n}", "the people of {n} bow to {v}",
         "the seal of {n} lies with {v}"),
        ("Who is the mayor of {n}?", "Who governs {n}?", "Who rules over {n}?")),
    "emblem": Relation(
        ("a {v} is carved over the gate of {n}", "the banner of {n} shows a {v}",
         "{n} stamps a {v} on its coins"),
        ("Which animal is the emblem of {n}?", "What creature stands for {n}?",
         "What is the symbol of {n}?")),
}
SHARED_QUESTIONS = ("Which hobby do {n} and {m} share?", "What pastime is common to {n} and {m}?",
                    "Which hobby did both {n} and {m} have?")
SHARED_TOPIC = "shared hobby"
# asides with words of the questions, about another person {o}; every passage has one
ASIDES = ("a letter to {o} names the town, the river and the profession",
          "{o} asked where the pet was born",
          "the living and the residence of {o} are told elsewhere",
          "a song on the mayor and the animal is by {o}",
          "{o} wrote of the hobby and the job",
          "a home, a product and a teacher are all that {o} left out")


# ---------------------------------------------------------------- entities

def is_held_out(name):
    """Return True for the quarter of all names that only dev and test questions may contain."""
    return zlib.crc32(name.encode()) % 4 == 0


def draw_names(rng, first_parts, last_parts, count, held_out):
    """Return `count` distinct two-part names, either all held out or none."""
    names = []
    for first in first_parts:
        for last in last_parts:
            name = f"{first} {last}"
            if is_held_out(name) == held_out:
                names.append(name)
    return rng.sample(names, count)


def make_entities(rng, num_people, num_towns, held_out):
    """Return (entities, people's names); an entity is {name, kind, facts: {relation: value}}.

    A hobby's value is a pair; `kind` is PERSON or TOWN.
    """
    people = draw_names(rng, FIRST, LAST, num_people, held_out)
    towns = draw_names(rng, TOWN_FIRST, TOWN_LAST, num_towns, held_out)
    entities = []
    for name in people:
        facts = {"birthplace": rng.choice(towns),
                 "home": rng.choice(towns),
                 "trade": rng.choice(TRADE),
                 "teacher": rng.choice([other for other in people if other != name]),
                 "animal": rng.choice(ANIMAL),
                 "hobby": rng.sample(HOBBY, 2)}
        entities.append({"name": name, "kind": PERSON, "facts": facts})
    for name in towns:
        facts = {"river": rng.choice(RIVER),
                 "goods": rng.choice(GOODS),
                 "mayor": rng.choice(people),
                 "emblem": rng.choice(ANIMAL)}
        entities.append({"name": name, "kind": TOWN, "facts": facts})
    return entities, people


# ---------------------------------------------------------------- passages

def write_passages(rng, entity, people, asides=1, names_in_full=True):
    """Return two passages {title, text, relations, sentences}, each with half of the facts.

    A passage has the entity's full name once and its last name afterwards (its last name only
    without `names_in_full`), and misleading asides. `sentences` are (relation, text), with the
    relation None for an aside.
    """
    relations = rng.sample(list(entity["facts"]), len(entity["facts"]))
    half = len(relations) // 2
    passages = []
    for part in (relations[:half], relations[half:]):
        sentences = []
        called = entity["name"] if names_in_full else entity["name"].split()[1]
        for relation in part:
            statement = rng.choice(entity["kind"][relation].statements)
            sentences.append((relation, state_fact(statement, called, entity["facts"][relation])))
            called = entity["name"].split()[1]
        for _ in range(asides):
            aside = rng.choice(ASIDES)
            other = rng.choice([name for name in people if name != entity["name"]])
            sentences.insert(rng.randrange(1, len(sentences) + 1), (None, aside.format(o=other)))
        sentences = [(relation, punctuate(text)) for relation, text in sentences]
        text = " ".join(text for _, text in sentences)
        passages.append({"title": entity["name"], "text": text, "relations": part,
                         "sentences": sentences})
    return passages


def state_fact(statement, name, value):
    """Return the statement of a fact about the entity of this name; a hobby's value is a pair."""
    if isinstance(value, list):
        first, second = value
        return statement.format(n=name, v=first, w=second)
    return statement.format(n=name, v=value)


def punctuate(sentence):
    """Add a capital, a full stop, and 'an' before a vowel."""
    sentence = sentence[0].upper() + sentence[1:] + "."
    return re.sub(r"\b(a) (?=[aeiou])", r"\1n ", sentence, flags=re.I)


# ---------------------------------------------------------------- questions

def write_question(rng, entity, relation):
    """Return (question, gold answers) about one fact."""
    question = rng.choice(entity["kind"][relation].questions).format(n=entity["name"])
    value = entity["facts"][relation]
    answers = list(value) if isinstance(value, list) else [value]
    return question, answers


def write_shared_question(rng, entities):
    """Return (question, gold answers, the two people) about two people with one common hobby."""
    people = [entity for entity in entities if entity["kind"] is PERSON]
    while True:
        first, second = rng.sample(people, 2)
        common = set(first["facts"]["hobby"]) & set(second["facts"]["hobby"])
        if len(common) == 1:
            question = rng.choice(SHARED_QUESTIONS).format(n=first["name"], m=second["name"])
            return question, list(common), (first, second)


class OverlapRanker:
    """Rank passages by the words that they share with a question, with noise.

    A score is the summed inverse document frequency of those words, times random noise.
    """

    def __init__(self, passages, blur):
        self.passages = passages
        self.blur = blur
        self.postings = defaultdict(list)  # {word: [(index of a passage, the word's weight in it)]}
        for index, passage in enumerate(passages):
            for word, count in self.words(passage["title"] + " " + passage["text"]).items():
                self.postings[word].append((index, count / (count + 1)))

    @staticmethod
    def words(text):
        """Return {word in lower case: how often it occurs}."""
        return Counter(re.findall(r"\w+", text.lower()))

    def rank(self, rng, question, top_k):
        """Return the first top_k contexts {id, title, text, score}."""
        scores = Counter()
        for word in self.words(question):
            for index, weight in self.postings[word]:
                scores[index] += weight * math.log(len(self.passages) / len(self.postings[word]))
        for index in scores:
            scores[index] *= math.exp(rng.gauss(0, self.blur))
        best = sorted(scores, key=lambda index: (-scores[index], index))[:top_k]
        contexts = []
        for index in best:
            passage = self.passages[index]
            context = {name: passage[name] for name in ("id", "title", "text")}
            context["score"] = round(scores[index], 4)
            contexts.append(context)
        return contexts


def make_records(rng, split, entities, ranker, count, top_k=20, shared=0.15):
    """Return `count` question records of one split; a share of `shared` of them needs two passages.

    A record's topic is the relation in question; federate.py --split topic deals records by it.
    """
    questions = []  # (topic, question, answers, [(name, relation) in a gold passage])
    facts = [(entity, relation) for entity in entities for relation in entity["facts"]]
    for entity, relation in rng.sample(facts, round(count * (1 - shared))):
        question, answers = write_question(rng, entity, relation)
        questions.append((relation, question, answers, [(entity["name"], relation)]))
    while len(questions) < count:
        question, answers, pair = write_shared_question(rng, entities)
        needed = [(person["name"], "hobby") for person in pair]
        questions.append((SHARED_TOPIC, question, answers, needed))
    rng.shuffle(questions)

    stated_in = {}  # {(name, relation): id of the one passage that states the fact}
    for passage in ranker.passages:
        for relation in passage["relations"]:
            stated_in[passage["title"], relation] = passage["id"]
    records = []
    for index, (topic, question, answers, needed) in enumerate(questions):
        gold = {stated_in[fact] for fact in needed}
        contexts = ranker.rank(rng, question, top_k)
        for context in contexts:
            context["has_answer"] = context["id"] in gold
        records.append({"id": f"{split}-{index}", "topic": topic, "question": question,
                        "answers": answers, "gold": sorted(gold), "ctxs": contexts})
    return records


# ---------------------------------------------------------------- the demo's world

def make_demo(seed=1, questions=(2000, 300, 600)):
    """Return the demo's corpus and splits: (passages, {train, dev, test}).

    questions: their number in each split. The contexts of training questions come only from the
    passages about training entities, those of dev and test questions from all passages.
    """
    rng = random.Random(seed)
    seen, seen_people = make_entities(rng, 300, 80, held_out=False)
    unseen, unseen_people = make_entities(rng, 210, 60, held_out=True)
    passages = []
    for entity in seen:
        passages += write_passages(rng, entity, seen_people)
    num_seen = len(passages)
    for entity in unseen:
        passages += write_passages(rng, entity, unseen_people)
    for number, passage in enumerate(passages, 1):
        passage["id"] = str(number)

    train_ranker = OverlapRanker(passages[:num_seen], blur=0.08)
    test_ranker = OverlapRanker(passages, blur=0.08)
    rng.shuffle(unseen)
    train, dev, test = questions
    splits = {"train": make_records(rng, "train", seen, train_ranker, train),
              "dev": make_records(rng, "dev", unseen[:90], test_ranker, dev),
              "test": make_records(rng, "test", unseen[90:], test_ranker, test)}
    return passages, splits


# ---------------------------------------------------------------- the loop's world

def make_hard(seed=1, questions=(1200, 300, 600)):
    """Return the corpus and splits of make demo-loop, without contexts.

    This world is harder to search by words. It has more people and so more look-alikes. A passage
    has its entity's full name only in the title, and three asides with the full names of others and
    with the questions' words.
    """
    rng = random.Random(seed)
    seen, seen_people = make_entities(rng, 600, 100, held_out=False)
    unseen, unseen_people = make_entities(rng, 400, 80, held_out=True)
    passages = []
    for entities, people in ((seen, seen_people), (unseen, unseen_people)):
        for entity in entities:
            passages += write_passages(rng, entity, people, asides=3, names_in_full=False)
    for number, passage in enumerate(passages, 1):
        passage["id"] = str(number)

    ranker = OverlapRanker(passages, blur=0)
    rng.shuffle(unseen)
    train, dev, test = questions
    splits = {"train": make_records(rng, "train", seen, ranker, train, top_k=0),
              "dev": make_records(rng, "dev", unseen[:160], ranker, dev, top_k=0),
              "test": make_records(rng, "test", unseen[160:], ranker, test, top_k=0)}
    return passages, splits


# ---------------------------------------------------------------- files

def write_text(path, text):
    """Write a file, never a part of it. Raises InputError if it cannot be written."""
    with new_file(path) as file:
        file.write(text)


def write_lines(path, lines):
    write_text(path, "\n".join(lines) + "\n")


def write_qrels(out, split, records):
    """Write the questions in BEIR's form: queries.SPLIT.jsonl, qrels.SPLIT.tsv and, for questions
    with contexts, mined.SPLIT.tsv.

    The mined documents (score 0) are contexts without the answer, ranked by word overlap.
    """
    header = "query-id\tcorpus-id\tscore"
    queries, gold, mined = [], [header], [header]
    for record in records:
        queries.append(json.dumps({"_id": record["id"], "text": record["question"]}))
        gold += [f"{record['id']}\t{passage_id}\t1" for passage_id in record["gold"]]
        negatives = [context for context in record.get("ctxs", [])
                     if not context["has_answer"]]
        mined += [f"{record['id']}\t{context['id']}\t0" for context in negatives]
    write_lines(out / f"queries.{split}.jsonl", queries)
    write_lines(out / f"qrels.{split}.tsv", gold)
    if len(mined) > 1:
        write_lines(out / f"mined.{split}.tsv", mined)


def write_questions(out, split, records, passages):
    """Write questions and answers alone (SPLIT.json), with the gold passages as contexts
    (gold.SPLIT.json) and, for training, with these as LLM-Embedder's positives (labelled.json).
    """
    plain, with_gold, labelled = [], [], []
    for record in records:
        question = {name: record[name] for name in ("id", "topic", "question", "answers")}
        indices = [int(identifier) - 1 for identifier in record["gold"]]
        contexts = [{name: passages[index][name] for name in ("id", "title", "text")}
                    for index in indices]
        texts = [f"{context['title']} {context['text']}" for context in contexts]
        plain.append(question)
        with_gold.append(question | {"ctxs": contexts})
        labelled.append(json.dumps(question | {"pos": texts, "pos_index": indices}))
    write_text(out / f"{split}.json", json.dumps(plain, indent=1))
    write_text(out / f"gold.{split}.json", json.dumps(with_gold, indent=1))
    if split == "train":
        write_lines(out / "labelled.json", labelled)


def recall_at(records, k):
    """Return the share of questions with a gold passage among their first k contexts."""
    answered = [any(context["has_answer"] for context in record["ctxs"][:k]) for record in records]
    return sum(answered) / len(records)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", default="toy/data", help="folder to write to (default: %(default)s)")
    add("--seed", type=int, default=1, help="seed of the world (default: %(default)s)")
    add("--hard", action="store_true", help="the world of make demo-loop, harder to search")
    add("--questions", type=int, nargs=3, metavar="N",
        help="of train, dev and test (default: 2000 300 600, with --hard 1200 300 600)")
    return parser.parse_args()


def main(args):
    out = Path(args.out)
    make = make_hard if args.hard else make_demo
    passages, splits = make(args.seed, *([args.questions] if args.questions else []))
    rows = [f"{passage['id']}\t{passage['text']}\t{passage['title']}" for passage in passages]
    write_lines(out / "corpus.tsv", ["id\ttext\ttitle"] + rows)
    for split, records in splits.items():
        write_qrels(out, split, records)
        if args.hard:
            write_questions(out, split, records, passages)
            print(f"{split:5s} {len(records)} questions")
            continue
        write_text(out / f"{split}.json", json.dumps(records, indent=1))
        percentages = ", ".join(f"{100 * recall_at(records, k):.0f} %" for k in (1, 2, 5, 10))
        print(f"{split:5s} {len(records)} questions, "
              f"gold passage among the first 1, 2, 5, 10: {percentages}")
    example = passages[0]
    print(f"corpus {len(passages)} passages, for example: {example['title']}: {example['text']}")


if __name__ == "__main__":
    run_script(main, parse_args())
