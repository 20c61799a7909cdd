/* tests/fuzz/seeds.h - where the fuzz targets start: what is sound in every form, and one
   input for each rule of the readers and parsers of the examples. */
#ifndef FUZZ_SEEDS_H
#define FUZZ_SEEDS_H

#include <stddef.h>

typedef struct seed {
  const char *data;
  size_t n;
} seed;
enum { RAW_IDX = 4, SOUND_PNM = 10 };
#ifdef STB_IMAGE
enum { SOUND_IDX = 9 };         /* gzip needs stb_image */
#else
enum { SOUND_IDX = RAW_IDX };
#endif
#define BYTES(literal) {literal, sizeof literal - 1}

/* The first byte chooses the parser: run.txt (0, 1), words (2), vocabulary (3), exf.config
   (4), names (5). */
static const seed text_seeds[] = {
  BYTES("0# a run\nsteps 5\nlr 0.001\n\nffn mb\ndata a b\nclip null\n"
        "order sequential\n"),
  BYTES("1width 128\r\nheads 4\r\nmu 0.95\r\ndata x\r\nseed 18\r\n"),
  BYTES("2--steps=5\n--lr\n1e-3\n--ffn\nmb\n--routed\n--quick\n--out\nx"),
  BYTES("2--help"), BYTES("2-h"), BYTES("2--ffn\nno such choice"), BYTES("2--\33[2J"),
  BYTES("0\n1"), BYTES("0data \33[2J"), BYTES("0"), BYTES("0{\"lr\":1}"), BYTES("0lr"),
  BYTES("0lr nan"), BYTES("0lr 1e999"), BYTES("0experts -1"), BYTES("0lr 1\nlr 2"),
  BYTES("1no-such-flag 1"), BYTES("3[10,32,33,65]"), BYTES("3"), BYTES("3["),
  BYTES("3[]"), BYTES("3[1,2"), BYTES("3[2,1]"), BYTES("3[256]"), BYTES("3[1,2]x"),
  BYTES("3x1,2]"), BYTES("4{\"n_head\": 4,\"activation\":\"gelu\"}"), BYTES("4"),
  BYTES("4{\"n_head\": 1e3}"), BYTES("4{\"n_head\":\"\"}"), BYTES("4{\"n_head\""),
  BYTES("5\001[\"a\",\"b\"]"), BYTES("5\0[\"T-shirt\\/top\"]"), BYTES("5\001[\"a\",]"),
  BYTES("5\001[\"a\",\"\\u001b\"]"), BYTES("5\0[]")
};

#define GZIP "\37\213\10\0\0\0\0\0\0\377"
#define NO_END "\0\0\0\0\0\0\0\0"      /* as checksum and size */

/* Sound files: RAW_IDX raw ones, then in gzip a stored block, fixed codes, codes of its
   own, every part of the header, blocks in turn; then one file for each rule. */
static const seed idx_seeds[] = {
  BYTES("\0\0\10\2\0\0\0\2\0\0\0\3abcdef"), BYTES("\0\0\10\1\0\0\0\0"),
  BYTES("\0\0\10\2\0\0\0\0\377\377\377\377"),
  BYTES("\0\0\10\10\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0\1a"),
  BYTES(GZIP "\1(\0\327\377\0\0\10\3\0\0\0\3\0\0\0\2\0\0\0\4\0\1\2\3\4\5\6\7\10\11"
        "\12\13\14\15\16\17\20\21\22\23\24\25\26\27W\335\35C(\0\0\0"),
  BYTES(GZIP "c`\340`f``\0a& fa`dbfaec\347\340\344\342\346\341\345\343\27\20\24\22"
        "\26\21\25\23\7\0W\335\35C(\0\0\0"),
  BYTES(GZIP "}\216\261\15\0001\14\2\301P\374\376S\375X\301\221\2334F\242\360\351"
        "\204\14|\4\360\247,\241L\27\254bR\362\200\334\300\252p@\23F\202\330N\22c"
        "\300\246dD\263\373\222v\222\214\254\212\355\373\335\1C\23\376\252\320\0\0\0"),
  BYTES("\37\213\10\36\0\0\0\0\0\377\2\0xxname\0comment\0hcc`\340`f``\0a& fa`dbfaec"
        "\347\340\344\342\346\341\345\343\27\20\24\22\26\21\25\23\7\0W\335\35C(\0"
        "\0\0"),
  BYTES(GZIP "b`\340`d``\330\305\300\310\304\314\302\312\306\16\0\0\0\377\377|\214"
        "\271\15\0000\20\302xn\377\231\303I4)\22wX\26\0(C\303\21\306b\220\247\42\33"
        "\313;a\305\32&\202\271MHQ\361Kr\342\376\336f\233\220\223\212\3\0\0\377\377c`"
        "dbfaec\7\0\272h\301V\302\0\0\0"),
  BYTES(""), BYTES("\0\0\10"), BYTES("\211PNG"), BYTES("\0\0\15\1\0\0\0\0"),
  BYTES("\0\0\10\0"), BYTES("\0\0\10\11"), BYTES("\0\0\10\2\0\0\0\2\0\0\0"),
  BYTES("\0\0\10\1\0\0\0\2a"), BYTES("\0\0\10\1\0\0\0\2abc"),
  BYTES("\0\0\10\3\377\377\377\377\377\377\377\377\377\377\377\377"),
  BYTES("\0\0\10\2\200\0\0\0\200\0\0\0"),
  BYTES("\37\213"), BYTES("\37\213\10\377" NO_END "\0\0\0\0\0\0\0"),
  BYTES("\37\213\10\4\0\0\0\0\0\0\377\377\0\0\0\0\0\0\0"), BYTES(GZIP "\7" NO_END),
  BYTES(GZIP "\1\4\0\372\377abcd" NO_END), BYTES(GZIP "\3\2" NO_END),
  BYTES(GZIP "\5\374\377\377\377\377\377\377\377\377\377\377" NO_END),
  BYTES(GZIP "\1\10\0\367\377\0\0\10\1\377\377\377\377" NO_END),
  BYTES(GZIP "\1\12\0\365\377\0\0\10\1\0\0\0\1ab" NO_END),
  BYTES(GZIP "\1\10\0\367\377\0\0\10\1\0\0\0\1" NO_END),
  BYTES(GZIP "\1\11\0\366\377\0\0\10\1\0\0\0\1a" NO_END),
  BYTES(GZIP "\1\11\0\366\377\0\0\10\1\0\0\0\1a" NO_END "x")
};

/* SOUND_PNM sound files, then one for each rule. */
static const seed pnm_seeds[] = {
  BYTES("P1\n# bits\n2 1\n10"), BYTES("P2 2 1 10\n 0 10"), BYTES("P3\n1 1\n255\n1 2 3\n"),
  BYTES("P4\n2 2\n\200@"), BYTES("P5 1 2 255\nab"), BYTES("P5 1 1 65535\n\200\200"),
  BYTES("P5 1 1 9\n\5"), BYTES("P6 # c\n1 1 255\nxyz"),
  BYTES("P6 2 1 1000\n\0\1\3\347\0\2\0\0\1\1\1\2"), BYTES("P2 3 2 255 0 1 2 3 4 255"),
  BYTES(""), BYTES("P7 1 1 255\n"), BYTES("P5"), BYTES("P5 0 1 255\na"),
  BYTES("P5 1 -1 255\na"), BYTES("P5 99999999999999999999 1 255\na"),
  BYTES("P5 8193 1 255\na"), BYTES("P5 1 1 0\na"), BYTES("P5 1 1 65536\na"),
  BYTES("P5 1 1 255xa"), BYTES("P5 2 2 255\nabc"), BYTES("P6 8192 8192 65535\nabc"),
  BYTES("P4 9 1\na"), BYTES("P2 2 1 10\n0 11"), BYTES("P2 2 2 10\n0 1 2 x"),
  BYTES("P5 1 1 9\na"), BYTES("P1 2 1\n1x")
};

#endif /* FUZZ_SEEDS_H */
