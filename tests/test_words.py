"""BM25's words in other languages; in English they equal bm25s's own."""
import json
import random
import unicodedata

import bm25s
import pytest

from retrieval import bm25
from retrieval.fingerprint import check_fingerprint
from retrieval.words import PLAIN_WORD, choose_rule, split_words
from retrieval_helpers import write_rows
from test_figures import run_retrieve

LANGUAGES = {
    "Chinese": (["码头旁边有一家面包店。", "图书馆星期天不开门。", "老桥是用铜做的。"],
                ["面包店在哪里？", "图书馆几点开门", "老桥"]),
    "Japanese": (["港の事務所は七時に開きます。", "パン屋は黒パンを売っている。", "ﾊﾞｽは橋を渡る。"],
                 ["事務所は何時に開きますか", "黒パン", "バス"]),
    "Korean": (["항구사무소는 일곱 시에 문을 연다.", "빵집에서 호밀빵을 판다.",
                "구리다리가 더 오래 간다."],
               ["항구사무소가 언제 여나", "호밀빵은 어디서", "구리다리"]),
    "Thai": (["สำนักงานท่าเรือเปิดเจ็ดโมงเช้า", "ร้านขนมปังขายขนมปังไรย์", "สะพานทองแดงทนกว่า"],
             ["สำนักงานเปิดกี่โมง", "ใครขายขนมปัง", "สะพานทองแดง"]),
    "Khmer": (["ការិយាល័យកំពង់ផែបើកម៉ោងប្រាំពីរ", "ហាងនំប៉័ងលក់នំប៉័ង", "ស្ពានទង់ដែងប្រើបានយូរ"],
              ["ការិយាល័យបើកម៉ោងណា", "នំប៉័ង", "ស្ពានទង់ដែង"]),
    "Burmese": (["ဆိပ်ကမ်းရုံးကို မနက်ခုနစ်နာရီတွင် ဖွင့်သည်", "မုန့်ဖုတ်သမားက ပေါင်မုန့်ရောင်းသည်", "ကြေးနီတံတား"],
                ["ဆိပ်ကမ်းရုံး", "ပေါင်မုန့်", "တံတား"]),
    "Hindi": (["बंदरगाह का कार्यालय सुबह खुलता है।", "बेकर राई की रोटी बेचता है।", "लालटेन का बाजार"],
              ["कार्यालय कब खुलता है", "रोटी कौन बेचता है", "लालटेन"]),
    "Tamil": (["துறைமுக அலுவலகம் ஏழு மணிக்கு திறக்கும்", "ரொட்டி விற்கும் கடை", "செம்பு பாலம்"],
              ["அலுவலகம் எப்போது", "ரொட்டி", "பாலம்"]),
    "Arabic": (["يَفْتَحُ مَكْتَبُ المِينَاءِ", "الخَبَّازُ يَبِيعُ الخُبْزَ", "جِسْرُ النُّحَاسِ"],
               ["مكتب", "الخبز", "النحاس"]),
    "Turkish": (["İstanbul limanı yedide açılır.", "Fırıncı ekmek satar.", "Bakır köprü."],
                ["istanbul", "ekmek", "köprü"]),
    "German, decomposed": ([unicodedata.normalize("NFD", text) for text in
                            ("Der Bäcker verkauft.", "Die Brücken halten.", "Häuser am Hafen.")],
                           ["Bäcker", "Brücken", "Häuser"]),
    "German, composed": (["Der Bäcker verkauft Brote.", "Die Brücken halten.", "Häuser am Hafen."],
                         [unicodedata.normalize("NFD", text) for text in
                          ("Bäcker", "Brücken", "Häuser")]),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_questions_find_their_documents(language, tmp_path, capsys):
    """Each question's document must rank first."""
    texts, queries = LANGUAGES[language]
    for name, rows in (("c", texts), ("q", queries)):
        write_rows(tmp_path / f"{name}.jsonl", [{"_id": str(i), "text": text}
                                                for i, text in enumerate(rows)])
    write_rows(tmp_path / "qrels", [f"{i} 0 {i} 1" for i in range(3)])
    run_retrieve("--retrieval_method", "bm25", "--corpus", tmp_path / "c.jsonl", "--queries",
                 tmp_path / "q.jsonl", "--qrels", f"qrels={tmp_path}/qrels", "--metrics", "mrr",
                 "--cutoffs", 3, "--measures", tmp_path / "m.json", "--index", tmp_path / "index",
                 "--key_template", "{text}")
    assert json.load(open(tmp_path / "m.json"))["mrr@3"] == 1
    logged = capsys.readouterr().out
    rule = "bm25s" if "German" in language else "unicode"  # German only needs NFC
    assert f"(--bm25_words {rule}, chosen because " in logged and "find no document" not in logged


def test_latin_texts_have_the_words_of_bm25s():
    """Both rules must give bm25s's words for English and similar languages."""
    texts = ["Don't x_y 3 42 naïve CAFÉ Straße œuvre", "ΟΔΟΣ Москва ещё 1,234.5 v2.0 U.S.A.",
             "", "a b", "e-mail: me@here.org — “quoted” ﬁn ½ x² №5"]
    expected = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
    for rule in ("bm25s", "unicode"):
        words = bm25.open_words("en", None, rule)
        assert bm25.tokenize_texts(texts, words) == expected


def test_ascii_is_split_as_by_the_pattern():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(map(chr, rng.choices(range(128), k=rng.randint(0, 30))))
        assert split_words(text, "bm25s") == PLAIN_WORD.findall(text)


def test_what_words_are_by_unicode():
    def words(text, stopwords=()):
        return split_words(text.lower(), "unicode", stopwords)
    assert words("2024年 T恤 京タワー 的") == ["2024", "年", "恤", "京タ", "タワ", "ワー", "的"]
    assert words("कार्यालय है व") == ["कार्यालय", "है"]
    assert words("ที่นี่") == ["ที่นี่"]  # two letters with their marks
    assert words("Schiff\u00adfahrt می\u200cخواهم") == ["schifffahrt", "میخواهم"]
    assert words("什么 铜桥", {"什么"}) == ["铜桥"]
    turkish = bm25.open_words("turkish", None, "bm25s")
    assert turkish.split("ISPARTA İzmir IŞIK") == ["ısparta", "izmir", "ışık"]


class Texts(list):
    text = list.__getitem__


def test_the_rule_goes_by_the_corpus():
    english = ["The crane was built in 1904 by a firm from Leeds, as the naïve say."] * 200
    assert choose_rule(Texts(english)) == ("bm25s", 0.0)
    rule, share = choose_rule(Texts([*english, "in 東京"]))
    assert rule == "bm25s" and 0 < share < 0.001
    assert choose_rule(Texts([*english, *["码头旁边有一家面包店"] * 3]))[0] == "unicode"


def test_queries_that_find_nothing_are_counted(tmp_path, capsys):
    """With bm25s's words Chinese questions find nothing, and a line reports it."""
    write_rows(tmp_path / "c.jsonl", [{"_id": "0", "text": "码头旁边有一家面包店。"}])
    write_rows(tmp_path / "q.jsonl", [{"_id": "a", "text": "面包店"}, {"_id": "b", "text": "码头"}])
    common = ["--retrieval_method", "bm25", "--corpus", tmp_path / "c.jsonl", "--queries",
              tmp_path / "q.jsonl", "--trec", tmp_path / "run", "--index", tmp_path / "index"]
    run_retrieve(*common, "--bm25_words", "bm25s")
    assert ("note: 2 of 2 queries find no document (first: 'a', '面包店'); no document contains "
            "any of their words") in capsys.readouterr().out
    run_retrieve(*common, code=1)  # the index was made with other words
    assert "an index of another words (words: 'bm25s', now 'unicode')" in capsys.readouterr().err
    run_retrieve(*common, "--overwrite_index")
    assert "find no document" not in capsys.readouterr().out


def test_an_index_from_before_the_rules_serves_english(tmp_path):
    settings = {"documents": 3, "model": "bm25", "k1": 0.9}
    (tmp_path / "index.json").write_text(json.dumps(settings))
    assert check_fingerprint(tmp_path, settings | {"words": "bm25s"})
    with pytest.raises(Exception, match="another words"):
        check_fingerprint(tmp_path, settings | {"words": "unicode"})
