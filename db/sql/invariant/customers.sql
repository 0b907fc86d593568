-- Invariants of customers and their saved payment methods.

create or replace view invariant.customers_are_found_by_email as
select customers.id as subject
from surety.customers
where customers.folded_email is distinct from surety.fold_email(customers.email);

comment on view invariant.customers_are_found_by_email is 'a customer is found by its e-mail address';

create or replace view invariant.saved_methods_were_proved as
select payment_methods.id as subject
from surety.payment_methods
left join surety.payments on payment_methods.payment_id = payments.id
where
    payments.customer_id is distinct from payment_methods.customer_id
    or payments.save_method is null
    or not exists (
        select from surety.steps
        where payment_methods.payment_id = steps.payment_id and steps.to_state in ('authorized', 'confirmed')
    );

comment on view invariant.saved_methods_were_proved is
'every saved payment method was proved by a payment of its customer';

create or replace view invariant.payments_charge_the_saved_method_that_they_name as
select payments.id as subject
from surety.payments
left join surety.payment_methods
    on payments.saved_method_id = payment_methods.id and payments.customer_id = payment_methods.customer_id
where payments.saved_method_id is not null and payments.method_token is distinct from payment_methods.provider_id;

comment on view invariant.payments_charge_the_saved_method_that_they_name is
'every payment by a saved payment method charges that one';
