// Every kernel, for the target whose file includes this one.
#include "product.h"
#include "elementwise.h"
#include "policy_loss.h"
#include "attention.h"
#include "attention_columns.h"
#include "focus.h"
#include "logits.h"
#include "attention_forward.h"
