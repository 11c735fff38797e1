/* A library without content: an empty file is not valid C. */
extern int fake_nothing;
