"""Where the data sets of the Hugging Face Hub lie that are known by name, and what is in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

CONVERTED = "refs/convert/parquet"
"""The hub's own conversion of a data set to Parquet: its configurations are folders.

For repositories that are a loading script, which `datasets` no longer runs.
"""


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies on the hub, and how its columns and splits are called.

    Attributes:
        path: repository, `owner/name`.
        text_columns: columns of the model's input.
        label_column: column of the class; None for a task without classes.
        target_column: column a generating model shall answer with.
        labels: class names in the order of their ids; empty: as its files say, else sorted.
        languages: its configurations that are languages; empty: any name is tried.
        without_train: those of them that have no train split, only validation and test.
        train_split: split, or several joined by "+", that train rows are taken from.
        test_split: the same for test rows.
        pool_train: train rows of each language and pool; None: half of the split.
        pool_test: test rows of each language and pool; None: half of the split.
        revision: branch, tag or commit.
        parallel: row n of a split is the same sentence in all languages.
        row_id: the column that names a row's sentence, in those copies that have it.
        quoted: whether its authors quote the fields of their TSV; None: found.
        other_names: column -> what copies call it: each a list of columns, joined by a blank.
    """

    path: str
    text_columns: tuple[str, ...] = ("text",)
    label_column: str | None = "label"
    target_column: str | None = None
    labels: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    without_train: tuple[str, ...] = ()
    train_split: str = "train"
    test_split: str = "test"
    pool_train: int | None = None
    pool_test: int | None = None
    revision: str | None = None
    parallel: bool = False
    row_id: str | None = None
    quoted: bool | None = None
    other_names: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """All columns that are used, each once."""
        extra = [column for column in (self.label_column, self.target_column) if column]
        return list(dict.fromkeys([*self.text_columns, *extra]))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


XNLI = HubSource(
    "facebook/xnli",
    text_columns=("premise", "hypothesis"),
    labels=("entailment", "neutral", "contradiction"),
    languages=_words(
        """
        ar bg de el en es fr hi ru sw th tr ur vi zh
        """
    ),
    pool_train=2000,
    pool_test=500,
    parallel=True,
)
MASAKHANEWS = HubSource(
    "masakhane/masakhanews",
    text_columns=("headline_text",),
    labels=(
        *("business", "entertainment", "health", "politics", "religion", "sports"),
        "technology",
    ),
    languages=_words(
        """
        amh eng fra hau ibo lin lug orm pcm run sna som swa tir xho yor
        """
    ),
    train_split="train+validation",
    revision=CONVERTED,
    other_names={"headline_text": (("headline", "text"),), "label": (("category",),)},
)
AFRISENTI = HubSource(
    "shmuhammad/AfriSenti-twitter-sentiment",
    text_columns=("tweet",),
    labels=("negative", "neutral", "positive"),
    languages=_words(
        """
        amh arq ary hau ibo kin pcm por swa tso twi yor orm tir
        """
    ),
    without_train=("orm", "tir"),
    train_split="train+validation",
    revision=CONVERTED,
    # Some files hold tweets that look as if they were quoted, others some that could not be.
    quoted=False,
    other_names={"tweet": (("text",),)},
)
SIB_200 = HubSource(
    "Davlan/sib200",
    label_column="category",
    labels=(
        *("entertainment", "geography", "health", "politics", "science/technology", "sports"),
        "travel",
    ),
    languages=_words(
        """
        ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn als_Latn
        amh_Ethi apc_Arab arb_Arab arb_Latn ars_Arab ary_Arab arz_Arab asm_Beng ast_Latn
        awa_Deva ayr_Latn azb_Arab azj_Latn bak_Cyrl bam_Latn ban_Latn bel_Cyrl bem_Latn
        ben_Beng bho_Deva bjn_Arab bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl cat_Latn
        ceb_Latn ces_Latn cjk_Latn ckb_Arab crh_Latn cym_Latn dan_Latn deu_Latn dik_Latn
        dyu_Latn dzo_Tibt ell_Grek eng_Latn epo_Latn est_Latn eus_Latn ewe_Latn fao_Latn
        fij_Latn fin_Latn fon_Latn fra_Latn fur_Latn fuv_Latn gaz_Latn gla_Latn gle_Latn
        glg_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva hne_Deva hrv_Latn
        hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan
        kab_Latn kac_Latn kam_Latn kan_Knda kas_Arab kas_Deva kat_Geor kaz_Cyrl kbp_Latn
        kea_Latn khk_Cyrl khm_Khmr kik_Latn kin_Latn kir_Cyrl kmb_Latn kmr_Latn knc_Arab
        knc_Latn kon_Latn kor_Hang lao_Laoo lij_Latn lim_Latn lin_Latn lit_Latn lmo_Latn
        ltg_Latn ltz_Latn lua_Latn lug_Latn luo_Latn lus_Latn lvs_Latn mag_Deva mai_Deva
        mal_Mlym mar_Deva min_Arab min_Latn mkd_Cyrl mlt_Latn mni_Beng mos_Latn mri_Latn
        mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva nqo_Nkoo nso_Latn nus_Latn nya_Latn
        oci_Latn ory_Orya pag_Latn pan_Guru pap_Latn pbt_Arab pes_Arab plt_Latn pol_Latn
        por_Latn prs_Arab quy_Latn ron_Latn run_Latn rus_Cyrl sag_Latn san_Deva sat_Olck
        scn_Latn shn_Mymr sin_Sinh slk_Latn slv_Latn smo_Latn sna_Latn snd_Arab som_Latn
        sot_Latn spa_Latn srd_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn szl_Latn
        tam_Taml taq_Latn taq_Tfng tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi
        tpi_Latn tsn_Latn tso_Latn tuk_Latn tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab
        ukr_Cyrl umb_Latn urd_Arab uzn_Latn vec_Latn vie_Latn war_Latn wol_Latn xho_Latn
        ydd_Hebr yor_Latn yue_Hant zho_Hans zho_Hant zsm_Latn zul_Latn
        """
    ),
    train_split="train+validation",
    revision=CONVERTED,
    parallel=True,
    row_id="index_id",
    other_names={"category": (("label",),)},
)
KNOWN = {
    "xnli": XNLI,
    "masakhanews": MASAKHANEWS,
    "afrisenti": AFRISENTI,
    "sib-200": SIB_200,
}
"""Name of the data set -> where it lies."""
